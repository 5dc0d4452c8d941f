"""The online side: HTTP, the edit store, the coordinator and the inference replicas."""
