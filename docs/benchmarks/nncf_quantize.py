"""Quantize an OpenVINO IR with one call of NNCF, in NNCF's own environment: only NNCF, OpenVINO and numpy are imported.

`python nncf_quantize.py IN.xml OUT.xml [INPUTS.npz]`: weights alone to int8 with `compress_weights`; with inputs
(`0.sample`, `0.timestep`, … `1.sample` …), weights and activations with `quantize`, for transformers, on all of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict

import nncf
import numpy as np
import openvino


def main() -> None:
    source, target, *inputs = sys.argv[1:]
    model = openvino.Core().read_model(source)
    started = time.perf_counter()
    if inputs:
        rows = _rows(inputs[0])
        model = nncf.quantize(
            model,
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
            fast_bias_correction=True,
        )
    else:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, target, compress_to_fp16=False)
    told = {"seconds": round(time.perf_counter() - started, 1), "nncf": nncf.__version__}
    sys.stdout.write(f"\n{json.dumps(told)}\n")


def _rows(file: str) -> list[dict[str, np.ndarray]]:
    rows: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for name, values in np.load(file).items():
        number, _, port = name.partition(".")
        rows[int(number)][port] = values
    return list(rows.values())


if __name__ == "__main__":
    main()
