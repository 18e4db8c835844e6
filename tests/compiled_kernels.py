"""Compiles the kernels that a batch and a step of ViT-B/16 launch, for an architecture and without a card.

python -m tests.compiled_kernels 80 [attention ...]     all kernels, or those of some files; one line each: its name and
                                                        the shared memory that it takes, in bytes
"""

import sys
from typing import Any

import torch
import triton
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from data import device_kernel
from modeling import fused_vit
from modeling.fused_sdtps import FusedSDTPS
from modeling.kernels import activation, attention, biases, embedding, linear, residual, selection

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def launches() -> dict[str, tuple[Any, tuple, dict]]:
    """Name of each kernel -> kernel, arguments and options with which a pass and its gradient launch it first."""
    seen: dict[str, tuple[Any, tuple, dict]] = {}

    def remember(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        if options.get("ADD", True):  # between a branch and a norm a kernel does all that it can
            seen.setdefault(name, (kernel, args, options))

    for module in (activation, attention, biases, device_kernel, embedding, linear, residual, selection):
        module.launch = remember
    selection.launch_that_fits = remember
    blocks = nn.ModuleList([Block(768, 12, qkv_bias=True, act_layer=QuickGELU) for _ in range(2)])
    norm = nn.LayerNorm(768)
    patches, class_tokens = torch.zeros(2, 128, 768, dtype=torch.bfloat16), torch.zeros(2, 768)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = fused_vit.embed_tokens(patches, class_tokens, nn.Parameter(torch.zeros(129, 768)), norm, patches.dtype)
        out = fused_vit.run_blocks(blocks, tokens)
    out.sum().backward()
    sdtps = FusedSDTPS(embed_dim=512, num_patches=128)
    v, g = torch.zeros(3, 2, 128, 512, dtype=torch.bfloat16, requires_grad=True), torch.zeros(3, 2, 512)
    scores, _, v = sdtps.score_by_kernels(v, g)
    kept, fused = selection.part_patches(v, scores, torch.zeros_like(scores, dtype=torch.long), 64)
    (kept.sum() + fused.sum()).backward()
    pixels, draws = torch.zeros(3, 2, 3, 256, 128, dtype=torch.uint8), torch.zeros(8, 3, 2, dtype=torch.long)
    device_kernel.prepare(pixels, torch.zeros(3, 256), draws, torch.zeros(2**20), 10)
    return seen


def compiled(kernel: Any, args: tuple, options: dict, architecture: int) -> Any:
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in options.items() if name in kernel.arg_names}
    constants = {name: v for name, v in values.items() if v is None or name.isupper()}
    signature = {name: "constexpr" if name in constants else _type(v) for name, v in values.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(values) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    given = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=given)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


if __name__ == "__main__":
    architecture, files = int(sys.argv[1]), sys.argv[2:]
    for name, (kernel, args, options) in launches().items():
        if "AHEAD" in options:
            options["AHEAD"] = attention.AHEAD[0] if architecture >= 90 else 1
        if not files or name.partition(".")[0] in files:
            print(name, compiled(kernel, args, options, architecture).metadata.shared, flush=True)
