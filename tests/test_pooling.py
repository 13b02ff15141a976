"""Pooling and resizing against torch on the CPU: windows beyond Inductor's 25 elements, uneven
windows, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import pagoda

P = "pagoda"
IMAGE, VOLUME = (1, 2, 9, 8), (1, 2, 7, 6, 5)


@pytest.fixture(autouse=True, scope="module")
def edge():
    pagoda.use_chip("edge")


CASES = {
    "overlapping large windows with padding": (
        lambda x: F.max_pool2d(x, (6, 5), (2, 3), (3, 2), return_indices=True), IMAGE),
    "dilated large windows, the last one cut": (
        lambda x: F.max_pool2d(x, (3, 9), (2, 3), (1, 2), (2, 1), True, True), (1, 2, 9, 11)),
    "small windows": (lambda x: F.max_pool2d(x, 3, 2, 1, 1, True, True), IMAGE),
    "means of large windows without their padding": (
        lambda x: F.avg_pool2d(x, (6, 5), (2, 3), (3, 2), True, False), IMAGE),
    "means of large windows with their padding": (
        lambda x: F.avg_pool2d(x, (6, 5), (2, 3), (3, 2), True, True), IMAGE),
    "means of large volumes": (lambda x: F.avg_pool3d(x, 4, 2, 1, True, False), VOLUME),
    "maxima of large volumes": (lambda x: F.max_pool3d(x, 4, 2, 1, 1, True, True), VOLUME),
    "maxima of small volumes": (lambda x: F.max_pool3d(x, 2, 2, 1, 1, True, True), VOLUME),
    "adaptive maxima of volumes": (lambda x: F.adaptive_max_pool3d(x, (2, 3, 5), True), VOLUME),
    "adaptive maxima, large": (lambda x: F.adaptive_max_pool2d(x, (1, 2), True), IMAGE),
    "adaptive maxima, even": (lambda x: F.adaptive_max_pool2d(x, (1, 1), True), IMAGE),
    "adaptive maxima, small": (lambda x: F.adaptive_max_pool2d(x, (4, 4), True), IMAGE),
    "adaptive means of volumes": (lambda x: F.adaptive_avg_pool3d(x, (2, 3, 5)), VOLUME),
    "nearest, by a factor of its own": (lambda x: F.interpolate(x, scale_factor=1.7), IMAGE),
    "nearest, twice as large": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    "nearest centre": (
        lambda x: F.interpolate(x, mode="nearest-exact", size=(5, 11)), IMAGE),
    "antialiased": (
        lambda x: F.interpolate(x, mode="bicubic", size=(4, 11), antialias=True), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pooling(name):
    function, shape = CASES[name]
    torch.manual_seed(0)
    x, found = torch.randn(shape), []
    for place in ("cpu", P):
        here = x.clone().to(place).requires_grad_()
        out = function(here)
        out = out if isinstance(out, tuple) else (out,)
        weights = torch.arange(out[0].numel(), dtype=torch.float32).reshape(out[0].shape)
        (out[0] * (weights / out[0].numel()).to(place)).sum().backward()
        found.append([t.detach().cpu() for t in (*out, here.grad)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
