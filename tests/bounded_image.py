"""Process images in little more memory than the process has without them; prints what could.

A script of its own, as the limit holds for a whole process.
"""

import base64
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import REFERENCE
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from dsvl import DSVLProcessor
from dsvl.serving.images import load_image
from dsvl.serving.requests import RequestLimits
from dsvl.training import ConversationCollator
from dsvl.training.feature_cache import MissingImages

ADDED = 500 * 2**20


def ways(path: str):
    """What makes model inputs of an image, by its name: functions without arguments."""
    processor = DSVLProcessor(CLIPImageProcessor(), AutoTokenizer.from_pretrained(REFERENCE / "tokenizer"))

    def conversation(**part):
        return [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "?"}]}]

    def serve():
        url = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
        image = load_image({"url": url}, 1, RequestLimits(image_pixels=89_000_000))
        return processor(text="<image>", images=[image], return_tensors="pt")["pixel_values"]

    empty = SimpleNamespace(files={})  # a cache of features
    sample = {"messages": [*conversation(path=path), {"role": "assistant", "content": "!"}]}
    return {
        "processor": lambda: processor(text="<image>", images=path, return_tensors="pt")["pixel_values"],
        "collator": lambda: ConversationCollator(processor)([sample])["pixel_values"],
        "features": lambda: next(iter(MissingImages([[sample]], empty, processor)[0][1].values()))["pixel_values"],
        "server": serve,
    }


def main(paths: list[str]) -> None:
    small = Path(paths[0]).with_name("small.png")
    Image.new("RGB", (300, 200)).save(small)
    for make in ways(str(small)).values():  # what is loaded at the first use
        make()
    (used,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")]
    resource.setrlimit(resource.RLIMIT_AS, (int(used) * 1024 + ADDED,) * 2)
    for path in paths:
        done = []
        for name, make in ways(path).items():
            assert tuple(make().shape) == (1, 3, 224, 224)
            done.append(name)
        print(f"{Path(path).stem}: {', '.join(done)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
