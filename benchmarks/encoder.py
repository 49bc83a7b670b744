"""all-MiniLM-L6-v2 in plain PyTorch, with the names of its published weights: BERT (Devlin et al. 2019, arXiv:1810.04805) with 6
blocks of width 384, and the mean of its tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, INNER, BLOCKS, WORDS, LONGEST = 384, 12, 1536, 6, 30522, 512


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(WORDS, WIDTH)
        self.position_embeddings = nn.Embedding(LONGEST, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.position_embeddings.weight[: ids.shape[1]]
        normed: Tensor = self.LayerNorm(self.word_embeddings(ids) + places + self.token_type_embeddings.weight[0])
        return normed


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        shape = (rows, tokens, HEADS, WIDTH // HEADS)
        query, key, value = (each(x).view(shape).transpose(1, 2) for each in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + bias
        attended: Tensor = scores.softmax(-1) @ value
        return attended.transpose(1, 2).reshape(x.shape)


class Output(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(x) + residual)
        return normed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(), "output": Output(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = Output(INNER)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        mixed: Tensor = self.output(functional.gelu(self.intermediate["dense"](x)), x)
        return mixed


class Encoder(nn.Module):
    """ids, mask: int64 (rows, tokens), the mask 1 for words and 0 behind them -> embedding: float32 (rows, 384) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(BLOCKS))})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        words = mask.to(torch.float32)
        bias = (1 - words)[:, None, None, :] * -10_000
        x = self.embeddings(ids)
        for block in self.encoder["layer"]:  # type: ignore[union-attr]
            x = block(x, bias)
        mean = (x * words[:, :, None]).sum(1) / words[:, :, None].sum(1)
        return functional.normalize(mean, dim=1)


def encoder() -> nn.Module:
    return Encoder()
