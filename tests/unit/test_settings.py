"""Settings that contradict each other, or what is there."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


def refused(**values: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    [error] = caught.value.errors()
    return f"{error['loc'][0]}: {error['msg']}"


def test_a_minimum_of_workers_above_their_number() -> None:
    said = refused(train_workers=2, train_workers_min=3)
    assert "train_workers_min: " in said
    assert "3 is more than train_workers, 2" in said
    elastic = Settings.model_validate({"train_workers": 3, "train_workers_min": 3})
    with pytest.raises(ValidationError, match="3 is more than train_workers, 2"):
        elastic.replace(train_workers=2)


def test_an_anchors_file_that_is_not_there(tmp_path: Path) -> None:
    assert f"anchors: Value error, {tmp_path / 'gone'}" in refused(anchors=tmp_path / "gone")


def test_the_cache_is_given_in_gibibytes() -> None:
    assert Settings.model_validate({"train_cache_gb": 0.5}).train_cache_bytes == 1 << 29
