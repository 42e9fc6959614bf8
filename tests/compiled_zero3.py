"""Steps under ZeRO-3, with compiled layers or without: what the forward pass leaves in main memory.

torchrun tests/compiled_zero3.py compiled|plain FILE [checkpointing]

writes the losses, the bytes of the weights and of what is left, and for each graph how many of torch's own linear layers it
has. `MALLOC_MMAP_THRESHOLD_` must be small, so that memory that is freed is returned.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from conftest import batch, tiny_model
from loading_memory import memory
from torch._dynamo import lookup_backend

from dsvl.training.deepspeed_config import zero_configuration
from dsvl.training.zero3 import gather_layer_by_layer

STEPS = 3

if __name__ == "__main__":
    way, file, *checkpointing = sys.argv[1:]
    deepspeed.init_distributed("gloo")
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    model = tiny_model("llama", dtype=torch.float32, **wide).set_trainable().train()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gather_layer_by_layer(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    linear_layers = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs = [one for one in graph.modules() if isinstance(one, torch.fx.GraphModule)]  # a checkpoint is one of them
        found = [one.graph.find_nodes(op="call_function", target=torch._C._nn.linear) for one in graphs]
        linear_layers.append(sum(map(len, found)))
        return lookup_backend("aot_eager")(graph, inputs)

    if way == "compiled":
        model.compile_decoder_layers(backend=compile_graph, fullgraph=True)
    config = json.loads(zero_configuration("zero3").read_text())
    keep_nothing = {"stage3_max_live_parameters": 10**7, "stage3_max_reuse_distance": 0}
    keep_nothing |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 10**6}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True}
    config |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "gradient_clipping": 1.0}
    config["train_batch_size"] = torch.distributed.get_world_size()
    config["zero_optimization"] |= keep_nothing
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(learning, lr=1e-3), config=config)
    inputs = batch("tItItttt", dtype=torch.float32)
    losses = []
    for _ in range(STEPS):
        gc.collect()
        before = memory()
        loss = engine(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        left = memory() - before
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found = {"losses": losses, "weights": weights, "left": left, "linear_layers": linear_layers}
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
