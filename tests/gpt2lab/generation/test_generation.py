"""Generation: batches equal single prompts, and sampling does not change the global random state."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

from gpt2lab.generation.decoder import Decoder
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.generation.token_choice import choice_device, inverse_cdf, row_uniforms
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import BEAM, GREEDY, NUCLEUS, TOP_K, ModelShape, SamplingSettings

END = 63
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


def model() -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=64))
    for parameter in backbone.parameters():
        parameter.data *= 4  # spread the logits out, so that no two tokens tie
    return backbone


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("banned", [0, 1, 2])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_left_padded_batches_equal_single_prompts(penalty: float, banned: int, beams: int) -> None:
    """Padding is end_of_text, which counts neither as repeated nor as generated. In float64 no two beams tie."""
    lm, most = model().lm.double(), 48
    sampling = SamplingSettings(
        "greedy", temperature=0.0, beams=beams, repetition_penalty=penalty, no_repeat_ngram=banned
    )
    together = generate_ids(lm, PROMPTS, sampling, max_new_tokens=most, end_of_text=END)
    alone = [generate_ids(lm, [prompt], sampling, max_new_tokens=most, end_of_text=END)[0] for prompt in PROMPTS]
    assert together == alone
    if banned == 1:
        assert any(len(text) < most for text in alone), "an end_of_text is written"


def test_greedy_is_the_argmax_of_the_logits() -> None:
    backbone = model()
    ids = list(PROMPTS[0])
    for _ in range(8):
        ids.append(backbone.eval().logits(torch.tensor([ids]))[0, -1].argmax().item())
    generated = generate_ids(backbone.lm, PROMPTS[:1], GREEDY, max_new_tokens=8, end_of_text=-1)[0]
    assert generated == ids[len(PROMPTS[0]) :]


def test_sampling_depends_on_the_seed_alone() -> None:
    lm = model().lm
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = generate_ids(lm, PROMPTS, NUCLEUS, max_new_tokens=8, end_of_text=END, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert generate_ids(lm, PROMPTS, NUCLEUS, max_new_tokens=8, end_of_text=END, seed=1) == first
    assert generate_ids(lm, PROMPTS, NUCLEUS, max_new_tokens=8, end_of_text=END, seed=2) != first


def test_seeds_of_rows_make_text_independent_of_the_batch() -> None:
    """Models are in float64, because the rounding of the logits depends on the padding."""
    lm, sampling = model().lm.double(), replace(NUCLEUS, temperature=1.5, repetition_penalty=1.2)

    def generate(prompts: list[list[int]], seeds: list[int], sampling: SamplingSettings) -> list[list[int]]:
        return generate_ids(lm, prompts, sampling, max_new_tokens=12, end_of_text=END, row_seeds=seeds)

    together = generate(PROMPTS, [1, 2, 3], sampling)
    assert together == [generate([p], [seed], sampling)[0] for p, seed in zip(PROMPTS, [1, 2, 3], strict=True)]
    assert together != generate(PROMPTS, [4, 5, 6], sampling)
    assert generate(PROMPTS, [1, 2, 3], SamplingSettings("one", top_k=1)) == generate(PROMPTS, [1, 2, 3], GREEDY)


def test_rows_are_sampled_from_the_softmax_of_their_logits() -> None:
    """Chi-square with 7 degrees of freedom: 24.3 is exceeded once in a thousand times."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 0.2, 1.5])
    rows, steps, temperature = 5_000, 4, 0.7
    for uniforms in row_uniforms(range(rows), steps):
        drawn = inverse_cdf((logits / temperature).expand(rows, -1), uniforms).flatten().bincount(minlength=8)
        expected = (logits / temperature).softmax(0) * rows
        assert float(((drawn - expected) ** 2 / expected).sum()) < 24.3


SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53  # of the uniform variates above 0
BANNED = -torch.inf


@pytest.mark.parametrize(
    ("logits", "uniform", "token"),
    [
        ([BANNED, 0.0, BANNED, 0.0, BANNED], 0.0, 1),
        ([BANNED, 0.0, BANNED, 0.0, BANNED], SMALLEST, 1),
        ([BANNED, 0.0, BANNED, 0.0, BANNED], 0.5 - SMALLEST, 1),
        ([BANNED, 0.0, BANNED, 0.0, BANNED], 0.5, 3),
        ([BANNED, 0.0, BANNED, 0.0, BANNED], LARGEST, 3),
        ([0.0, -1e4, BANNED], LARGEST, 0),
        ([0.0] * 7 + [BANNED], LARGEST, 6),  # 7 · fp32(1 / 7) > 1
        ([0.0] * 41 + [BANNED], LARGEST, 40),  # 41 · fp32(1 / 41) < 1
    ],
)
def test_sampled_tokens_have_positive_probability(logits: list[float], uniform: float, token: int) -> None:
    assert inverse_cdf(torch.tensor([logits]), torch.tensor([[uniform]], dtype=torch.float64)).item() == token


def test_sampling_from_nan_logits_returns_some_token() -> None:
    for width, uniform in ((3, LARGEST), (4, 0.5), (1, 0.0)):
        drawn = inverse_cdf(torch.full((1, width), torch.nan), torch.tensor([[uniform]], dtype=torch.float64))
        assert drawn.item() in range(width)


@pytest.mark.parametrize(("device", "expected"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_tokens_are_chosen_where_float64_exists(device: str, expected: str) -> None:
    assert choice_device(torch.device(device)) == torch.device(expected)


def test_random_numbers_of_a_row_depend_on_its_seed_alone() -> None:
    together = row_uniforms([1, 2, 3], 20)
    for row, seed in enumerate([1, 2, 3]):
        assert torch.equal(row_uniforms([seed], 40)[:20, 0], together[:, row])
    assert together.unique().numel() == together.numel()


@pytest.mark.parametrize("sampling", [NUCLEUS, BEAM], ids=lambda sampling: sampling.name)
def test_a_streamer_can_interrupt_the_generation_at_a_token(sampling: SamplingSettings) -> None:
    class Interrupting(BaseStreamer):
        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    backbone, calls = model(), []
    backbone.lm.transformer.ln_f.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(KeyboardInterrupt):
        generate_ids(backbone.lm, PROMPTS, sampling, max_new_tokens=40, end_of_text=END, streamer=Interrupting())
    assert len(calls) <= 3
    assert backbone.lm.training


def test_top_k_never_leaves_the_k_best() -> None:
    backbone = model()
    best = backbone.eval().logits(torch.tensor([PROMPTS[0]]))[0, -1].topk(3).indices.tolist()
    sampling = SamplingSettings("top_k", temperature=5.0, top_k=3)
    drawn = {
        generate_ids(backbone.lm, PROMPTS[:1], sampling, max_new_tokens=1, end_of_text=-1, seed=seed)[0][0]
        for seed in range(40)
    }
    assert drawn == set(best)


def test_generation_keeps_train_mode_and_the_end_of_long_prompts() -> None:
    lm = model().lm.train()
    long = list(range(60)) * 3
    assert generate_ids(lm, [long], GREEDY, max_new_tokens=8, end_of_text=END) == generate_ids(
        lm, [long[-56:]], GREEDY, max_new_tokens=8, end_of_text=END
    )
    assert lm.training
    assert len(generate_ids(lm, [[]], TOP_K, max_new_tokens=4, end_of_text=END)) == 1


@pytest.mark.parametrize("layout", ["own", "plain"])
def test_decoder_in_pieces_equals_one_forward_pass(layout: str) -> None:
    backbone = model().eval()
    lm = backbone.lm if layout == "own" else to_hf(backbone)
    ids = torch.randint(1, END, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = lm(ids, attention_mask=mask, position_ids=positions).logits
        decoder = Decoder(lm, 14, padding=torch.tensor([3, 0]))
        pieces = [decoder.read(ids[:, start:end], last=end - start) for start, end in ((0, 5), (5, 6), (6, 10))]
        decoder.read(torch.zeros(2, 4, dtype=torch.long))
        decoder.truncate(10)
        pieces.append(decoder.read(ids[:, 10:], last=2))
    found = torch.cat(pieces, 1)
    torch.testing.assert_close(found[0, 3:], expected[0, 3:], rtol=1e-4, atol=1e-4)  # another order of sums
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


class Casts(TorchDispatchMode):
    """Number of casts of each tensor of some storages."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.counts = {tensor.untyped_storage().data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            function is torch.ops.aten._to_copy.default
            and (place := args[0].untyped_storage().data_ptr()) in self.counts
        ):
            self.counts[place] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_autocast_casts_each_weight_once(outside: Callable[[], AbstractContextManager[None]]) -> None:
    lm = model().lm
    with outside(), torch.autocast("cpu", torch.bfloat16), Casts(lm.parameters()) as casts:
        generate_ids(lm, PROMPTS, NUCLEUS, max_new_tokens=8, end_of_text=END)
    assert max(casts.counts.values()) == 1


def test_generation_under_autocast_keeps_gradients() -> None:
    backbone = model()

    def gradients(generates: bool) -> list[torch.Tensor]:
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if generates:
                generate_ids(backbone.lm, PROMPTS, NUCLEUS, max_new_tokens=4, end_of_text=END)
            backbone.eval().logits(torch.tensor(PROMPTS[:1])).sum().backward()
        return [parameter.grad for parameter in backbone.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("weights", "autocast", "cache"),
    [
        (torch.float32, False, torch.float32),
        (torch.float32, True, torch.float32),
        (torch.bfloat16, False, torch.float32),
        (torch.float64, False, torch.float64),
    ],
)
def test_keys_and_values_have_at_least_fp32_on_a_cpu(weights: torch.dtype, autocast: bool, cache: torch.dtype) -> None:
    lm = model().eval().lm.to(weights)
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = lm(ids).logits[:, -1:]
        decoder = Decoder(lm, 8)
        decoder.read(ids[:, :-1])
        found = decoder.read(ids[:, -1:])
    assert {block.dtype for block in decoder.cache} == {cache}
    assert found.dtype == expected.dtype
    rounding = 0.05 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))


SAMPLINGS = [
    GREEDY,
    TOP_K,
    NUCLEUS,
    SamplingSettings("min_p", temperature=1.5, min_p=0.1),
    SamplingSettings("typical", typical_p=0.5),
    SamplingSettings("penalized", top_p=0.9, repetition_penalty=1.3, no_repeat_ngram=2),
    SamplingSettings("beams", beams=3, no_repeat_ngram=2),
    SamplingSettings("short_beams", beams=3, length_penalty=-8.0),
    SamplingSettings("long_beams", beams=3, length_penalty=8.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda sampling: sampling.name)
def test_text_equals_transformers_with_the_same_seed(sampling: SamplingSettings) -> None:
    """The exported model generates in a padded batch."""
    backbone = model()
    plain = to_hf(backbone)
    longest = max(len(prompt) for prompt in PROMPTS)
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    drawn |= {"min_p": sampling.min_p, "typical_p": sampling.typical_p}
    torch.manual_seed(5)
    theirs = plain.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        pad_token_id=END,
        eos_token_id=END,
        do_sample=not sampling.is_greedy,
        num_beams=sampling.beams,
        length_penalty=sampling.length_penalty,
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram,
        **({} if sampling.is_greedy else drawn),
    )[:, longest:].tolist()
    ours = generate_ids(backbone.lm, PROMPTS, sampling, max_new_tokens=20, end_of_text=END, seed=5)
    assert ours == [row[: row.index(END)] if END in row else row for row in theirs]
    assert any(len(row) > 10 for row in ours) or sampling.name == "short_beams"


def test_a_length_penalty_below_0_favours_short_texts() -> None:
    lm = model().lm
    short, long = (
        sum(map(len, generate_ids(lm, PROMPTS, replace(BEAM, length_penalty=p), max_new_tokens=40, end_of_text=END)))
        for p in (-8.0, 8.0)
    )
    assert short < long


def test_beam_search_reads_prompts_bidirectionally() -> None:
    """A beam of one token is the greedy choice."""
    lm = model().lm
    for beams in (1, 3):
        sampling = SamplingSettings("few", temperature=0.0, beams=beams)
        found = generate_ids(lm, PROMPTS, sampling, max_new_tokens=1, end_of_text=END, bidirectional=True)
        assert found == generate_ids(lm, PROMPTS, GREEDY, max_new_tokens=1, end_of_text=END, bidirectional=True)
    assert found != generate_ids(lm, PROMPTS, GREEDY, max_new_tokens=1, end_of_text=END)


def test_padding_of_the_vocabulary_is_never_generated() -> None:
    lm = model().lm
    sampling = SamplingSettings("hot", temperature=50.0)
    for chosen in (sampling, SamplingSettings("beams", beams=2)):
        rows = generate_ids(lm, PROMPTS, chosen, max_new_tokens=30, end_of_text=19, vocab_size=20)
        assert max(token for row in rows for token in row) < 20
