"""The offline side: trains edits into weights, writes them as versions. Never imports `service`."""
