"""One conditional transformer layer, and the small parts that models are made of.

Shapes: B samples, T tokens, D = dim, H heads. `cond` is [B, 1 or T, D]: it says how noisy the sample (or the
token) is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C_NOISE_SCALE = (
    1000.0  # c_noise spans about 2.7 units; unscaled, a sinusoid of it has some 3 effective dimensions
)
MAX_PERIOD = 10_000.0


class Linear(nn.Linear):
    """A linear map with Xavier weights and zero bias; `zero=True` starts it at zero (gates and read-outs)."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False) -> None:
        self.zero = zero
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)
        if self.zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight)


class Table(nn.Module):
    """A learned table [num_rows, dim], drawn from N(0, std^2): positions, tokens, class embeddings."""

    def __init__(self, num_rows: int, dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def normalized(self) -> Tensor:
        """The rows at length 1, in fp32: the clean targets y of discrete denoising, in training and sampling
        alike.
        """
        return F.normalize(self.weight.float(), dim=-1)


class TimeEmbedding(nn.Module):
    """c_noise [B] or [B, T] -> cond [B, 1 or T, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.inner = Linear(dim, dim)
        self.outer = Linear(dim, dim)

    def forward(self, c_noise: Tensor) -> Tensor:
        if c_noise.ndim == 1:
            c_noise = c_noise[:, None]
        frequencies = torch.exp(
            -math.log(MAX_PERIOD) * torch.arange(self.dim // 2, device=c_noise.device) / (self.dim // 2)
        )
        angles = C_NOISE_SCALE * c_noise[..., None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.inner.weight.dtype)
        return torch.as_tensor(self.outer(F.silu(self.inner(waves))))


def modulate(h: Tensor, shift: Tensor, scale: Tensor, rms: bool = False) -> Tensor:
    """A norm without weights of its own (layer norm, or RMS norm), then the condition's shift and scale
    (AdaLN).
    """
    norm = F.rms_norm if rms else F.layer_norm
    return torch.as_tensor(norm(h, h.shape[-1:]) * (1 + scale) + shift)


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, T, C p p]: patches row by row."""
    batch, channels, height, width = image.shape
    cut = image.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch_size**2)


def unpatchify(patches: Tensor, image_shape: tuple[int, int, int], patch_size: int) -> Tensor:
    """[B, T, C p p] -> [B, C, H, W]: undoes `patchify`."""
    channels, height, width = image_shape
    cut = patches.reshape(
        len(patches), height // patch_size, width // patch_size, channels, patch_size, patch_size
    )
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), *image_shape)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, d], positions [T]; pairs are (i, i + d / 2)."""
    half = x.shape[-1] // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class KeyValueCache:
    """Keys and values [B, H, T, d] of the clean tokens that one layer has seen."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return k, v
        return torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)


Pattern = Literal["full", "causal", "clean_noisy"]


class Layer(nn.Module):
    """A residual layer z <- z + f(z): attention, then an MLP, each normalised, shifted, scaled and gated by
    `cond` (AdaLN-zero).

    `pattern` of attention: `full`; `causal`; `clean_noisy`, for T = 2 L tokens, a clean half and a noisy
    half: clean i sees clean <= i, noisy i sees clean < i and itself, nothing sees another noisy token (paper,
    App. B). `llama` takes RMS norm, rotary positions and a SwiGLU MLP in place of layer norm, no positions
    and GELU.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        dropout: float,
        pattern: Pattern = "full",
        llama: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.pattern, self.llama = num_heads, dropout, pattern, llama
        hidden = (
            2 * mlp_ratio * dim // 3 // 2 * 2 if llama else mlp_ratio * dim
        )  # as many weights with and without the gate
        self.modulation = Linear(dim, 6 * dim, zero=True)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.mlp_in = Linear(dim, 2 * hidden if llama else hidden)
        self.mlp_out = Linear(hidden, dim)

    def forward(
        self, h: Tensor, cond: Tensor, cache: KeyValueCache | None = None, keep: bool = False
    ) -> Tensor:
        """With a cache, h is [B, 1, D], the next token, clean (`keep`: it joins the cache) or noisy."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(cond)).chunk(6, dim=-1)
        h = h + gate_a * self._drop(self.attention(modulate(h, shift_a, scale_a, self.llama), cache, keep))
        return torch.as_tensor(h + gate_m * self._drop(self.mlp(modulate(h, shift_m, scale_m, self.llama))))

    def mlp(self, x: Tensor) -> Tensor:
        inner: Tensor = self.mlp_in(x)
        if self.llama:
            gate, value = inner.chunk(2, dim=-1)
            return torch.as_tensor(self.mlp_out(F.silu(gate) * value))
        return torch.as_tensor(self.mlp_out(F.gelu(inner, approximate="tanh")))

    def attention(self, x: Tensor, cache: KeyValueCache | None = None, keep: bool = False) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = (
            self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        )  # [B, H, T, d] each
        if self.llama:
            half = tokens // 2 if self.pattern == "clean_noisy" and cache is None else tokens
            positions = torch.arange(tokens, device=x.device) % half + (0 if cache is None else len(cache))
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            keys, values = cache.extended(k, v)
            mixed = F.scaled_dot_product_attention(q, keys, values)
            if keep:
                cache.keys, cache.values = keys, values
        elif self.pattern == "clean_noisy":
            mixed = clean_noisy_attention(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.pattern == "causal")
        return torch.as_tensor(self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def clean_noisy_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, 2 L, d]: causal among the clean half; noisy i over clean < i and itself."""
    (q_clean, q_noisy), (k_clean, _), (v_clean, _) = q.chunk(2, dim=2), k.chunk(2, dim=2), v.chunk(2, dim=2)
    length = q_clean.shape[2]
    clean = F.scaled_dot_product_attention(q_clean, k_clean, v_clean, is_causal=True)
    square = torch.ones(length, length, dtype=torch.bool, device=q.device)
    mask = torch.cat([square.tril(-1), torch.eye(length, dtype=torch.bool, device=q.device)], dim=1)
    return torch.cat([clean, F.scaled_dot_product_attention(q_noisy, k, v, attn_mask=mask)], dim=2)
