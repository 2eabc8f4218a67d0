"""Adam in the symbols of its papers, one tensor and one formula at a time: the oracle of the faster ones."""

import torch
from torch import Tensor


@torch.no_grad()
def adam_update(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    *,
    t: float,
    alpha: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    lambda_: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """Takes step ``t`` of Adam in place: θ_t, m_t, v_t (and v_max_t) replace θ_{t-1}, m_{t-1}, v_{t-1}.

    All tensors have one shape and one device (one that supports float64), any strides and any real floating dtype.
    The arithmetic is done in float64 and each result is rounded once, when it is stored, so that the
    function is an oracle for half precision, too. O(n) time; about ten temporaries of n float64 values.

    Sources: Adam is algorithm 1 of Kingma & Ba, arXiv 1412.6980 (ε is added to the root). Decoupled weight
    decay is algorithm 2, line 12, of Loshchilov & Hutter, arXiv 1711.05101, with the decay scaled by α as
    PyTorch does; coupled decay is line 6. AMSGrad is algorithm 2 of Reddi, Kale & Kumar 2018 with PyTorch's
    bias correction, which divides the maximum of the raw second moments.

    Args:
        theta: parameters θ_{t-1}.
        g: gradient g_t at θ_{t-1}; not changed.
        m: first moment m_{t-1}, zeros before the first step.
        v: second raw moment v_{t-1}, zeros before the first step.
        v_max: largest second raw moment so far, zeros before the first step; ``None`` without AMSGrad.
        t: number of this step, from 1.
        alpha: learning rate α, at least 0.
        beta1: decay rate β₁ in [0, 1).
        beta2: decay rate β₂ in [0, 1).
        epsilon: ε, at least 0; with 0, an element that has never had a gradient becomes NaN (0/0).
        lambda_: weight decay λ, at least 0.
        decoupled: subtract αλθ from θ instead of adding λθ to the gradient.
        maximize: ascend; the gradient is negated first.
    """
    theta_t, g_t = theta.double(), g.double()
    if maximize:
        g_t = -g_t
    if lambda_ and decoupled:
        theta_t = theta_t - alpha * lambda_ * theta_t
    elif lambda_:
        g_t = g_t + lambda_ * theta_t

    m_t = beta1 * m.double() + (1 - beta1) * g_t
    v_t = beta2 * v.double() + (1 - beta2) * g_t**2
    v_used = v_t if v_max is None else v_max.double().maximum(v_t)

    m_hat = m_t / (1 - beta1**t)
    v_hat = v_used / (1 - beta2**t)
    theta_t = theta_t - alpha * m_hat / (v_hat.sqrt() + epsilon)

    theta.copy_(theta_t)
    m.copy_(m_t)
    v.copy_(v_t)
    if v_max is not None:
        v_max.copy_(v_used)
