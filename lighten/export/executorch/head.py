"""The head in 8 bits: its inputs are evened, and what the roundings of inputs and weights cost is weighed.

Every token's inputs share one scale, and so do the weights of an output. Divide an input by a number and multiply its
weights by it: where the input was loud, the others get finer codes, and where its weights become loud, the other
weights get coarser ones. The numbers are found by descent on an estimate of what both roundings cost the model:

    E[range(x / d)²] / 255² · Σ_i d_i² f_i   +   FED · Σ_o g_o (max_i |w_oi d_i| / 127)² · Σ_i E[x_i²] / d_i²

where x are the inputs without their means, f_i is the variance of the weights of input i over the tokens that the model
thinks possible, and g_o is that of "it is token o" (both are the Fisher information of the logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lighten.export.executorch.inputs import EVENED

SAMPLES = 8
"""Sequences that are read: with two, the weights of the head of SmolLM2-135M cost a fifth more."""
SEEN = 1024
"""Tokens whose distribution is computed."""
AT_ONCE = 128
"""Those that are computed together."""
OUTPUTS = 8192
"""Outputs of a head whose weights are looked at: the most probable ones."""
TURNS, RATE, BATCH = 60, 0.04, 512
"""Steps of the descent, how far a logarithm goes in one, and tokens of one."""
FED = 0.6
"""What error feedback leaves of the cost of rounding weights to the nearest."""


@torch.no_grad()
def inputs_of(model: Any, ids: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """Returns what comes to the head for tokens `[samples, length]`: `[tokens, in]` in float32."""
    found: list[torch.Tensor] = []

    def hear(_: Any, inputs: Any) -> None:
        found.append(inputs[0].reshape(-1, head.in_features).float().clone())

    handle = head.register_forward_pre_hook(hear)
    try:
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
    finally:
        handle.remove()
    return torch.cat(found) if found else torch.zeros(0, head.in_features)


@torch.enable_grad()  # whatever the caller does
def evened(inputs: torch.Tensor, head: nn.Linear) -> torch.Tensor | None:
    """Returns what every input of a head is divided by, `[in]`, with a geometric mean of 1.

    Args:
        inputs: of some tokens, `[tokens, in]`.
        head: with its weights in floats.

    Returns:
        None if the estimate is no number: inputs or weights are not finite, or never differ.
    """
    inputs, weight = inputs.detach(), head.weight.detach().float()
    moved = inputs - inputs.mean(0)
    of_inputs, of_outputs = _worth(inputs[_some(len(inputs), SEEN)], head)
    places = of_outputs.topk(min(OUTPUTS, len(of_outputs))).indices
    sizes, shares = weight[places].abs(), of_outputs[places]
    power = inputs.square().mean(0)
    logs = torch.zeros(len(power), requires_grad=True)
    descent = torch.optim.Adam([logs], lr=RATE)
    for turn in range(TURNS):
        divided = moved[_some(len(moved), BATCH, turn)] / logs.exp()
        span = divided.amax(-1).clamp(min=0) - divided.amin(-1).clamp(max=0)
        cost = span.square().mean() * (logs.exp().square() * of_inputs).sum() / 255**2
        steps = (sizes * logs.exp()).amax(1) / 127
        cost = cost + FED * (shares * steps.square()).sum() * (power / logs.exp().square()).sum()
        if not 0 < cost.item() < float("inf"):
            return None
        descent.zero_grad()
        (cost / cost.detach()).backward()  # type: ignore[no-untyped-call]
        descent.step()
        with torch.no_grad():
            logs -= logs.mean()
    return logs.detach().exp().clamp(1 / EVENED, EVENED)


def _some(count: int, most: int, seed: int = 0) -> torch.Tensor:
    """Returns some places of `count`, always the same ones of a seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]


@torch.no_grad()
def _worth(inputs: torch.Tensor, head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the variance of the weights of each input `[in]`, and that of each output `[out]`, over the tokens."""
    weight = head.weight.detach().float()
    of_inputs, of_outputs = torch.zeros(weight.shape[1]), torch.zeros(weight.shape[0])
    for some in torch.split(inputs, AT_ONCE):
        likely = nn.functional.linear(some, weight, head.bias).softmax(-1)
        of_outputs += (likely * (1 - likely)).sum(0)
        of_inputs += (likely.sum(0) @ weight.square()) - (likely @ weight).square().sum(0)
    return of_inputs.clamp(min=0) / len(inputs), of_outputs / len(inputs)
