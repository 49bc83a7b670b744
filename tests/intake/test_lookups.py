"""The range of an integer input is found in what the module looks up with it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.intake.lookups import Lookups

TABLE = torch.rand(4, 5)
CUBE = torch.rand(7, 4, 2)

LOOKUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "an embedding": lambda k: nn.Embedding(4, 5)(k),
    "an embedding of a cast and reshaped input": lambda k: functional.embedding(k.int().long().reshape(-1, 1).squeeze(1), TABLE),
    "the smaller of two tables": lambda k: nn.Embedding(9, 2)(k).sum() + TABLE[k].sum(),
    "one hot": lambda k: functional.one_hot(k, 4),
    "one hot by keyword": lambda k: functional.one_hot(k, num_classes=4),
    "one hot by scatter": lambda k: torch.zeros(k.shape[0], 4).scatter_(1, k[:, None], 1.0),
    "rows": lambda k: TABLE[k],
    "another axis": lambda k: CUBE[:, k],
    "two axes": lambda k: CUBE[torch.zeros_like(k), k],
    "part of the input": lambda k: TABLE[k[:1]],
    "index_select": lambda k: TABLE.index_select(dim=0, index=k),
    "gather": lambda k: CUBE.gather(1, k.view(-1, 1, 1)),
    "parts": lambda k: sum((TABLE[part] for part in k.unbind(0)), torch.zeros(5)),
}


@pytest.mark.parametrize("look", LOOKUPS.values(), ids=LOOKUPS)
def test_an_input_that_is_looked_up_has_as_many_values_as_the_table_rows(look: Callable[[Tensor], Tensor]) -> None:
    lookups = Lookups({"k": torch.zeros(3, dtype=torch.int64), "other": torch.zeros(3, dtype=torch.int64)})
    with lookups:
        look(lookups._known[0][0])
    assert lookups.rows == {"k": 4}


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum": lambda k: TABLE[k + 1],
    "a comparison": lambda k: (k == 1) * TABLE[0, 0],
    "as many classes as there are": lambda k: functional.one_hot(k),
    "itself indexed": lambda k: k[0],
    "an ellipsis before it": lambda k: CUBE[..., 0, k % 2],
}


@pytest.mark.parametrize("look", OTHER.values(), ids=OTHER)
def test_other_uses_say_nothing(look: Callable[[Tensor], Tensor]) -> None:
    k = torch.zeros(3, dtype=torch.int64)
    lookups = Lookups({"k": k})
    with lookups:
        look(k)
    assert lookups.rows == {}
