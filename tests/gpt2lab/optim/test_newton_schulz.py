"""Several ranks divide Muon's matrices: the updates of one rank, a share of its work."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2lab.optim import newton_schulz
from gpt2lab.optim.newton_schulz import assign_owners, orthogonalize, orthogonalize_over_ranks, split_matrices
from tests.conftest import ROOT


@pytest.mark.parametrize(("layers", "width"), [(2, 32), (12, 768), (48, 1600)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_have_equal_shares_of_newton_schulz(layers: int, width: int, ranks: int) -> None:
    """Each rank has as many matrices of each shape as the others, if that number divides; its cost always is near."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    matrices = split_matrices([torch.empty(shape, device="meta") for shape in shapes], ranks)
    owned = assign_owners(matrices, ranks)
    assert Counter(m for own in owned for m in own) == Counter(matrices), "every matrix once"
    costs = [sum(matrix.cost for matrix in own) for own in owned]
    assert max(costs) - min(costs) <= max(matrix.cost for matrix in matrices)
    if layers % ranks == 0:
        counts = [Counter((matrix.rows, matrix.columns) for matrix in own) for own in owned]
        share = layers // ranks
        assert counts == [{(width, width): 4 * share, (4 * width, width): share, (width, 4 * width): share}] * ranks


def test_one_rank_orthogonalizes_merged_qkv_as_three() -> None:
    updates = [torch.randn(96, 32), torch.randn(32, 128)]
    qkv, wide = (update.clone() for update in updates)
    orthogonalize_over_ranks(updates)
    expected = torch.cat([orthogonalize(part[None])[0].float() * (0.2 * 32**0.5) for part in qkv.chunk(3)])
    assert torch.equal(updates[0], expected)
    assert torch.equal(updates[1], orthogonalize(wide[None])[0].float() * (0.2 * 128**0.5))


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_products_are_in_bf16_only_if_the_device_has_it(
    has_bf16: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton_schulz, "multiplies_bf16", lambda _device: has_bf16)
    products: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
                products.update(one.dtype for one in args)
            return func(*args, **(kwargs or {}))

    matrices = torch.randn(2, *shape)
    with Products():
        result = orthogonalize(matrices)
    assert products == {torch.bfloat16 if has_bf16 else torch.float32}
    assert result.dtype == torch.bfloat16
    singular = torch.linalg.svdvals(result.float())
    assert 0.6 < singular.min() <= singular.max() < 1.3


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layers"), [(2, 2), (3, 2), (7, 1)])
def test_ranks_update_like_one_with_a_share_of_its_work(ranks: int, layers: int, tmp_path: Path) -> None:
    """Under ddp and fsdp, with the same gradients.

    Three ranks do not divide the rows of any matrix; of seven, one has none of the six matrices of a layer.
    """
    program = str(ROOT / "tests" / "support" / "muon_ranks.py")
    files = [tmp_path / f"{rank}.json" for rank in range(ranks)]
    command, store = [sys.executable, program], str(tmp_path / "store")
    started = [
        subprocess.Popen([*command, str(rank), str(ranks), store, str(file), str(layers)])
        for rank, file in enumerate(files)
    ]
    assert [process.wait(timeout=300) for process in started] == [0] * ranks
    found = [json.loads(file.read_text()) for file in files]
    for layout in found[0]:
        assert max(of_rank[layout]["difference"] for of_rank in found) <= 1e-6, layout
        done: Counter[str] = Counter()
        for of_rank in found:
            done.update(of_rank[layout]["own"])
        assert done == found[0][layout]["all"], "every matrix on one rank only"
        if ranks == 2:
            assert all(of_rank[layout]["own"] == {s: n // 2 for s, n in done.items()} for of_rank in found), layout
