"""``vs_trl`` at a size: random weights, forced lengths, bfloat16; then TRL alone in ways that are not the same work.

    python -m benchmarks.gpu.trl 0.5b [--device cpu]

These ways keep no float32 master weights (``bfloat16 weights``) or cast them away (``continuous batching``). They are
shown beside TRL's ``best``, with all completions at the limit, and are not part of the comparison. Where TRL is not
installed the part says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json

# On a GPU, nearly all of TRL's step is generation. Its batch in the update matters little, as long as it fits.
ON_GPU = ["--prompts=8", "--generations=8", '--trl={"per_device_train_batch_size": 16}']
ON_CPU = ["--prompts=2", "--generations=2"]
LENGTHS = {"cuda": (120, 192), "cpu": (10, 16)}  # mean, longest
OTHER_WAYS = ["best", "bfloat16 weights", "continuous batching"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        print(json.dumps({"left_out": f"not installed: {', '.join(missing)}"}))
        return
    from benchmarks import vs_trl
    from benchmarks.gpu.models import model_folder

    mean, longest = LENGTHS[options.device]
    with model_folder(options.shape) as folder:
        fixed = [f"--model={folder}", "--dtype=bfloat16", f"--device={options.device}", f"--max-length={longest}"]
        fixed += ["--rows", "same work", *(ON_CPU if options.device == "cpu" else ON_GPU)]
        steps = 1 if options.device == "cpu" else 3
        result = vs_trl.measure(vs_trl.parse([*fixed, f"--mean-length={mean}", f"--steps={steps}", "--no-gradients"]))
        print(json.dumps(result), flush=True)
        others = [*fixed, f"--mean-length={longest}", "--steps=1", "--sweep", *OTHER_WAYS]
        print(json.dumps({"TRL otherwise": vs_trl.measure(vs_trl.parse(others))["sweep, same work"]}))


if __name__ == "__main__":
    main()
