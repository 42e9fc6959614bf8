"""A process that loads a checkpoint, decodes by a compiled step, and prints what the compiler found on disk.

python tests/compiled_decoding.py CHECKPOINT
"""

import json
import os
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec

if __name__ == "__main__":
    spec = find_spec("dsvl")
    sys.modules["dsvl"] = package = module_from_spec(spec)
    import_module("dsvl.utils.compiled_code").keep_compiled_code()  # before torch is imported, as the command does
    spec.loader.exec_module(package)
    import torch
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    from dsvl.utils.model_loading import load_checkpoint

    model, _ = load_checkpoint(sys.argv[1], device="cpu")
    compile_config = CompileConfig(mode="default")
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config, "eos_token_id": None}
    ids = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, do_sample=False, **options)
    found = {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}
    print(json.dumps({"tokens": ids[0].tolist(), "directory": os.environ["TORCHINDUCTOR_CACHE_DIR"], "found": found}))
