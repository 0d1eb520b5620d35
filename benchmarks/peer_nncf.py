"""Compressions by NNCF, for benchmarks/openvino_front.py; runs in an environment of its own.

python peer_nncf.py MODEL.xml ROWS CASES OUT: ROWS is JSON of calibration token ids, CASES JSON of names and options of
`nncf.compress_weights`. The script writes openvino_model.xml and .bin to OUT/NAME,
and prints the seconds of each case as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nncf
import numpy as np
import openvino


def main(model: str, rows: str, cases: str, out: str) -> None:
    texts = [np.array([row], dtype=np.int64) for row in json.loads(Path(rows).read_text())]
    inputs = [
        {
            "input_ids": text, "attention_mask": np.ones_like(text),
            "position_ids": np.arange(text.shape[1])[None], "beam_idx": np.zeros(1, dtype=np.int32),
        }
        for text in texts
    ]  # fmt: skip
    seconds = {}
    for name, options in json.loads(cases).items():
        arguments = {**options, "mode": nncf.CompressWeightsMode(options["mode"])}
        if arguments.get("awq") or arguments.get("scale_estimation"):
            arguments["dataset"] = nncf.Dataset(inputs)
        start = time.perf_counter()
        network = nncf.compress_weights(openvino.Core().read_model(model), **arguments)
        seconds[name] = time.perf_counter() - start
        folder = Path(out) / name
        folder.mkdir(parents=True)
        openvino.save_model(network, folder / "openvino_model.xml", compress_to_fp16=False)
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
