"""Models small enough to train here, written out so that nothing has to be downloaded."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm transformer block: causal attention, then a multilayer perceptron."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """A GPT over bytes: int64 [batch, context] -> next-byte logits float32 [batch, context, 256]."""

    def __init__(self, width: int = 128, layers: int = 5, heads: int = 4, context: int = 128):
        super().__init__()
        if width % heads:
            raise ValueError(f"a GPT of {heads} heads needs a width that is a multiple of {heads}, got {width}")
        self.context = context
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_byte_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each byte of int64 [batch, context + 1] but the first, given those before it."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Perceptron(nn.Module):
    """A multilayer perceptron: images float32 [batch, 3, 32, 32] -> logits float32 [batch, 10]; `layers` beside the first and the last."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.first, self.last = nn.Linear(3 * 32 * 32, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.first(images.flatten(1)))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.last(x)


class Stack(nn.Module):
    """Linear layers with tanh and a path around each, so that gradients have one scale at any depth: float32 [batch, width] -> the same."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return x


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalization, and a path around them, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.around(x))


class ResNet(nn.Module):
    """A residual network for small images, float32 [batch, 3, 32, 32] -> logits float32 [batch, 10], as in He et al. 2016,
    section 4.2: three stages of `layers` blocks with width, 2 width and 4 width channels."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        shapes = [(width, width, 1)] * layers + [(width, 2 * width, 2)] + [(2 * width, 2 * width, 1)] * (layers - 1)
        shapes += [(2 * width, 4 * width, 2)] + [(4 * width, 4 * width, 1)] * (layers - 1)
        self.blocks, self.head = nn.Sequential(*(Residual(*shape) for shape in shapes)), nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.conv(images)))).mean((2, 3)))


class Recommender(nn.Module):
    """Embeddings of users and items, of which a batch meets few, and a perceptron over both and their product (after He et al.,
    Neural Collaborative Filtering, WWW 2017): int64 [batch], int64 [batch] -> log-odds of a click, float32 [batch]."""

    def __init__(self, width: int, layers: int, users: int, items: int):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        hidden = [layer for _ in range(layers - 1) for layer in (nn.Linear(2 * width, 2 * width), nn.ReLU())]
        self.tower = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.ReLU(), *hidden, nn.Linear(2 * width, 1))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        u, i = self.users(users), self.items(items)
        return self.tower(torch.cat([u, i, u * i], dim=1)).squeeze(1)


class ByteLSTM(nn.Module):
    """An LSTM over bytes: int64 [batch, context] -> next-byte logits float32 [batch, context, 256]."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.token, self.lstm, self.head = nn.Embedding(256, width), nn.LSTM(width, width, layers, batch_first=True), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.token(tokens))[0])


class Sleeping(nn.Module):
    """Layers that take their time without a processor: x (1 + w) elementwise, float32 [320, width], after 20 ms asleep in
    forward and 30 ms in backward."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(0.02 * torch.randn(320, width)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = _Asleep.apply(x, w)
        return x


class _Asleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        time.sleep(0.020)
        ctx.save_for_backward(x, w)
        return x * (1 + w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.030)
        x, w = ctx.saved_tensors
        return gradient * (1 + w), gradient * x
