"""Checks of gpu_check.py without a training run: attention kernels and the LM-head loss.

    python -m benchmarks.gpu_kernels lm_head

Prints a line with each result so far; the last is the result. A violated claim is an exit code of 1. With --tiny,
`lm_head` runs on a CPU too; the others need a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.benchmark_lm_head_loss import memory_here, times_here
from benchmarks.lm_head_sides import Head, missing_packages
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.model.attention_masks import document_bounds, make_spans, spans_to_mask
from gpt2lab.model.backbone import Backbone
from gpt2lab.settings import ModelShape

VOCABULARY, CONTEXT, SEQUENCES = 50_257, 1024, 16
SMALL = ModelShape(n_layer=12, n_head=12, n_embd=768, vocab_size=VOCABULARY)
CLOSE = 0.1  # for hidden states around 1, in 16 bits
SAME_GRADIENT = 0.05  # norm of the difference ÷ norm, in bf16
ROUNDS = 8


def flash_attention() -> str:
    """Check flash attention, forward and backward with all other kernels disabled, in bf16 and fp16."""
    backbone = Backbone(ModelShape(n_layer=2, n_head=12, n_embd=768, vocab_size=VOCABULARY)).cuda()
    ids = torch.randint(VOCABULARY, (2, CONTEXT), device="cuda")  # (B, T)
    differences = []
    for dtype in (torch.bfloat16, torch.float16):
        hidden = []
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(kernel), torch.autocast("cuda", dtype=dtype):
                hidden.append(backbone(ids, lambda hidden, weight: hidden))  # (B, T, D)
            hidden[-1].float().square().mean().backward()
        differences.append((hidden[0] - hidden[1]).float().abs().max().item())
    if max(differences) > CLOSE:
        raise RuntimeError(f"hidden states differ from the plain kernel's by {max(differences):.3f}")
    return f"runs; largest difference from the plain kernel {max(differences):.3f}"


def packing(prefix: bool) -> str:
    """Check several documents per row, causal or with prefixes, with masked SDPA in bf16 as in training.

    Another first document must not change the hidden states of the others, bit for bit, and gradients must be those of
    eager attention. Also measures the kernels alone, including flex attention, which skips masked blocks.
    """
    backbone, spans = Backbone(SMALL).cuda(), _documents(prefix).cuda()
    ids = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT), device="cuda")
    _check_no_leak(backbone, ids, spans)
    masked = _gradient(backbone, ids, spans)
    backbone.lm.config._attn_implementation = "eager"
    plain = _gradient(backbone, ids, spans)
    backbone.lm.config._attn_implementation = "sdpa"
    difference = ((masked - plain).norm() / plain.norm()).item()
    if not difference < SAME_GRADIENT:
        raise RuntimeError(f"the gradient differs from plain attention's by {difference:.1e}")
    whole = {"causal": None, "packed": spans}
    eager = {name: _median(partial(_gradient, backbone, ids, some)) for name, some in whole.items()}
    backbone.compile_blocks()
    compiled = {name: _median(partial(_gradient, backbone, ids, some)) for name, some in whole.items()}
    passes = ", ".join(f"{name} {eager[name]:.0f} (compiled {compiled[name]:.0f})" for name in whole)
    kernels = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in _kernels(spans).items())
    same = f"no leak; gradient as plain attention's to {difference:.1e}"
    return f"{same}; ms of small without head: {passes}; of one layer's attention: {kernels}"


def _check_no_leak(backbone: Backbone, ids: Tensor, spans: Tensor) -> None:
    second = int((spans[0, :, 0] > 0).nonzero()[0])  # first position of the second document
    other = ids.clone()
    other[:, :second] = (ids[:, :second] + 1) % VOCABULARY
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        open_, apart = (
            [backbone(some, lambda hidden, weight: hidden, seen)[0, second:] for some in (ids, other)]
            for seen in (None, spans)
        )
    if torch.equal(*open_):
        raise RuntimeError("without spans the first document should affect the others")
    if not torch.equal(*apart):
        raise RuntimeError("a document changes the hidden states of another")


def _heads() -> list[Tensor]:
    """Return queries, keys and values (B, H, T, D/H) of one layer of small."""
    shape = (SEQUENCES, SMALL.n_head, CONTEXT, SMALL.n_embd // SMALL.n_head)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def _kernels(spans: Tensor) -> dict[str, float]:
    """Measure the milliseconds of one layer's attention, forward and backward, by kernel."""
    query, key, value = _heads()
    seen, (first, end) = spans_to_mask(spans), spans.unbind(2)

    def sees(sequence: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= first[sequence, row]) & (column < end[sequence, row])

    blocks = create_block_mask(sees, SEQUENCES, None, CONTEXT, CONTEXT, device="cuda")
    flex = torch.compile(flex_attention)
    ways: dict[str, Callable[[], Tensor]] = {
        "flash, causal": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "SDPA, masked": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=seen),
        "flex": lambda: flex(query, key, value, block_mask=blocks),
    }

    def forward_backward(way: Callable[[], Tensor]) -> None:
        way().sum().backward()

    return {name: _median(partial(forward_backward, way)) for name, way in ways.items()}


def attention_kernels() -> str:
    """Measure causal attention of small, forward and backward in bf16, by PyTorch's kernels."""
    query, key, value = _heads()
    gradient, found = torch.randn_like(query), {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def work(kernel: SDPBackend = kernel) -> None:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(gradient)

        try:
            found[kernel.name] = f"{_median(work):.2f}"
        except RuntimeError as error:
            found[kernel.name] = f"refused ({str(error).splitlines()[0][:60]})"
    return "ms of one layer: " + ", ".join(f"{name.removesuffix('_ATTENTION')} {ms}" for name, ms in found.items())


def lm_head_chunks() -> str:
    """Measure cross-entropy and its gradient at several chunk sizes, and its three matrix products alone."""
    rows, width = SEQUENCES * CONTEXT, SMALL.n_embd
    hidden = torch.randn(rows, width, device="cuda", requires_grad=True)
    weight = torch.randn(VOCABULARY, width, device="cuda", requires_grad=True)
    labels = torch.randint(VOCABULARY, (rows,), device="cuda")
    left, right = hidden.detach().bfloat16(), F.pad(weight.detach().bfloat16(), (0, 0, 0, -VOCABULARY % 64))  # (V', D)
    logits = left @ right.T  # (N, V')

    def loss(chunk_rows: int) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            lm_head_loss(hidden, weight, labels, chunk_rows=chunk_rows, compiled=True).total.backward()

    def products() -> None:
        torch.mm(left, right.T, out=logits)
        logits @ right
        logits.T @ left

    times = {}
    for size in (1_024, 2_048, 4_096, 8_192, rows):
        torch.compiler.reset()  # each size is compiled as the only one of a run is, not for sizes that vary
        times[f"{size:,} rows"] = _median(partial(loss, size))
    times["the three products alone"] = _median(products)
    return "ms: " + ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in times.items())


def compare_lm_head_losses(tiny: bool = False) -> str:
    """Measure time and memory of cross-entropy and forward KL in bf16, D = 768, for every side, fastest first."""
    results = [f"not installed here: {name}" for name in missing_packages()]
    sizes = (16, 64, 320) if tiny else (SMALL.n_embd, SEQUENCES * CONTEXT, VOCABULARY)
    for loss in ("cross_entropy", "forward_kl"):
        head, refused = Head(loss, "bf16", *sizes), dict[str, str]()
        times = times_here(head, rounds=ROUNDS, compiles=True, refused=refused)
        names = sorted(times, key=times.__getitem__)
        cells = {name: f"{name} {times[name]:.1f} ms" for name in names}
        cells |= {name: f"{name} refused ({error})" for name, error in refused.items()}
        title = loss.replace("_", " ")
        print("; ".join([*results, f"{title}: {', '.join(cells.values())}"]), flush=True)
        for name in names:
            cells[name] += f" {memory_here(head, name, compiles=True) / 1e6:,.0f} MB"
        results.append(f"{title}: {', '.join(cells.values())}")
    return "; ".join(results)


def _documents(prefix: bool) -> Tensor:
    """Make spans (B, T, 2) of documents of 64 to 511 tokens."""
    random = torch.Generator().manual_seed(0)
    starts = torch.zeros(SEQUENCES, CONTEXT, dtype=torch.bool)
    starts[:, 0] = True
    for row in starts:
        place = 0
        while (place := place + int(torch.randint(64, 512, (), generator=random))) < CONTEXT:
            row[place] = True
    first, end = document_bounds(starts)
    return make_spans(first, end, first + (end - first) // 2 if prefix else 0)


def _gradient(backbone: Backbone, ids: Tensor, spans: Tensor | None) -> Tensor:
    """Return the gradient of the first block's QKV projection, which accumulates the errors of later blocks."""
    backbone.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = backbone(ids, lambda hidden, weight: hidden, spans)
    hidden.float()[..., ::7].square().sum().backward()
    weight = backbone.get_parameter("lm.transformer.h.0.attn.c_attn.weight")
    assert weight.grad is not None
    return weight.grad.clone()


def _median(work: Callable[[], object]) -> float:
    """Return the median milliseconds after warm-up rounds."""
    seconds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[ROUNDS // 4 :]) * 1e3


CHECKS: dict[str, Callable[[], str]] = {
    "lm_head": compare_lm_head_losses,
    "lm_head_chunks": lm_head_chunks,
    "attention": attention_kernels,
    "flash_attention": flash_attention,
    "packed_documents": partial(packing, prefix=False),
    "packed_prefixes": partial(packing, prefix=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--tiny", action="store_true", help="lm_head: takes seconds; results are meaningless")
    options = parser.parse_args()
    if options.tiny and options.check != "lm_head":
        parser.error("--tiny is for lm_head; the other checks need a GPU")
    print(compare_lm_head_losses(tiny=True) if options.tiny else CHECKS[options.check](), flush=True)


if __name__ == "__main__":
    main()
