"""Generation: batches give what single prompts give, and sampling disturbs nobody's random numbers."""

import torch

from gpt2lab.backbone import Backbone
from gpt2lab.generation import GREEDY, NUCLEUS, TOP_K, Sampling, generate_ids
from gpt2lab.settings import ModelShape

END = 63
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


def model() -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=64))
    for parameter in backbone.parameters():
        parameter.data *= 4  # spread the logits out, so that no two tokens tie
    return backbone


def test_left_padded_batches_equal_single_prompts() -> None:
    lm = model().lm
    together = generate_ids(lm, PROMPTS, GREEDY, max_new_tokens=12, end_of_text=END)
    alone = [generate_ids(lm, [prompt], GREEDY, max_new_tokens=12, end_of_text=END)[0] for prompt in PROMPTS]
    assert together == alone


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


def test_top_k_never_leaves_the_k_best() -> None:
    backbone = model()
    best = backbone.eval().logits(torch.tensor([PROMPTS[0]]))[0, -1].topk(3).indices.tolist()
    sampling = Sampling("top_k", temperature=5.0, top_k=3)
    drawn = {
        generate_ids(backbone.lm, PROMPTS[:1], sampling, max_new_tokens=1, end_of_text=-1, seed=seed)[0][0]
        for seed in range(40)
    }
    assert drawn == set(best)


def test_a_model_in_training_stays_in_training_and_long_prompts_keep_their_end() -> None:
    lm = model().lm.train()
    long = list(range(60)) * 3
    assert generate_ids(lm, [long], GREEDY, max_new_tokens=8, end_of_text=END) == generate_ids(
        lm, [long[-56:]], GREEDY, max_new_tokens=8, end_of_text=END
    )
    assert lm.training
    assert len(generate_ids(lm, [[]], TOP_K, max_new_tokens=4, end_of_text=END)) == 1
