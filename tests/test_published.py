"""The parameter files of the papers' scale against the published settings, number by number."""
from pathlib import Path

import pytest
import yaml

PARAMETERS = Path(__file__).resolve().parents[1] / "parameters"
TRAIN = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((PARAMETERS / "train").glob("*.yaml"))}


@pytest.mark.parametrize("name", [n for n, v in TRAIN.items() if v["method"] == "mdlm"])
def test_mdlm_is_not_told_the_time(name):
    assert TRAIN[name]["time_conditioning"] is False, "MDLM is published without time conditioning"
