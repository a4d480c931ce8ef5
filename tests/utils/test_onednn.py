"""oneDNN keeps few compiled products in a process that loads a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from real_fast.model.load import load_model

NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# oneDNN's log says of each product whether it was compiled or found. A hundred numbers of rows, then the first again.
CHILD = """
import torch
from real_fast.utils.onednn import keep_few_products
keep_few_products()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(8, 108), 8]:
    print("rows", rows, flush=True)
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(("given", "found"), [(None, "cache_miss"), ("1024", "cache_hit")])
def test_a_product_is_forgotten_behind_64_others(given, found):
    env = os.environ | {"ONEDNN_VERBOSE": "2", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    env.pop(NAME, None)
    env |= {} if given is None else {NAME: given}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True)
    last = done.stdout.rsplit("rows 8\n", 1)[1]
    if "onednn_verbose" not in last:
        pytest.skip("oneDNN computes no 16-bit products on this processor")
    assert f"create:{found}" in last


def test_it_is_so_wherever_a_model_is_loaded(tiny_judge, monkeypatch):
    monkeypatch.setenv(NAME, "")  # so that it is put back
    monkeypatch.delenv(NAME)
    load_model(str(tiny_judge), torch.device("cpu"), torch.float32)
    assert os.environ[NAME] == "64"
    monkeypatch.setenv(NAME, "7")
    load_model(str(tiny_judge), torch.device("cpu"), torch.float32)
    assert os.environ[NAME] == "7"
