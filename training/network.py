"""The residual network in torch, inside a policy of sb3-contrib's MaskablePPO.

Its arithmetic is that of `tierwise.placement.network.Network`; `training.export` checks it.
"""

from typing import Any

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import nn
from torch.nn import functional

from envs.placement import GAP, VALID
from envs.vector import HINDSIGHT
from tierwise.placement.features import CANDIDATES_MAX, FEATURES

BETA = 20.0


class Residual(nn.Module):
    """One network for every candidate; any number of them, in any order."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(len(FEATURES), hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.layer3 = nn.Linear(3 * hidden, hidden)
        self.layer4 = nn.Linear(hidden, 1)
        # A new policy is the base score, exactly: learning starts from the heuristic.
        nn.init.zeros_(self.layer4.weight)
        nn.init.zeros_(self.layer4.bias)

    def pooled(
        self, features: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden values (b, k, H) and their mean‖max over valid candidates (b, 2H)."""
        hidden = torch.relu(self.layer2(torch.relu(self.layer1(features))))
        weight = valid.unsqueeze(-1)
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        # relu makes hidden ≥ 0, so 0 for invalid rows never wins over a valid one.
        maximum = (hidden * weight).amax(dim=1)
        return hidden, torch.cat([mean, maximum], dim=-1)

    def forward(self, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Return residuals (b, k) of features (b, k, 24) with valid (b, k) in {0, 1}."""
        hidden, context = self.pooled(features, valid)
        width = hidden.shape[-1]
        own, common = self.layer3.weight[:, :width], self.layer3.weight[:, width:]
        # The context is the same for all candidates: its share of the layer is computed once.
        shared = functional.linear(context, common, self.layer3.bias)
        third = torch.relu(functional.linear(hidden, own) + shared.unsqueeze(1))
        residual: torch.Tensor = self.layer4(third).squeeze(-1)
        return residual


class Critic(nn.Module):
    """What the value is read from: the candidates, the base score's choice, and hindsight."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rows = Residual(hidden)
        self.joined = nn.Linear(3 * hidden + HINDSIGHT, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return shape (b, H), of observations (b, 16, 30)."""
        valid, gap = rows[:, :, VALID], rows[:, :, GAP]
        hidden, context = self.rows.pooled(rows[:, :, :GAP], valid)
        best = torch.argmin(gap + 1e3 * (1.0 - valid), dim=1)
        first = hidden[torch.arange(len(rows)), best]
        seen = torch.cat([context, first, rows[:, 0, -HINDSIGHT:]], dim=-1)
        return torch.relu(self.joined(seen))


class Heads(nn.Module):
    """What stable-baselines3 calls the MLP extractor: logits, and a context for the value."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.residual = Residual(hidden)
        self.critic = Critic(hidden)
        self.latent_dim_pi = CANDIDATES_MAX
        self.latent_dim_vf = hidden

    def forward(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (logits, value context)."""
        return self.forward_actor(flat), self.forward_critic(flat)

    def forward_actor(self, flat: torch.Tensor) -> torch.Tensor:
        """Return logits −β·gap + f, shape (b, 16); masking follows outside."""
        rows = flat.view(flat.shape[0], CANDIDATES_MAX, -1)
        residual = self.residual(rows[:, :, :GAP], rows[:, :, VALID])
        logits: torch.Tensor = residual - BETA * rows[:, :, GAP]
        return logits

    def forward_critic(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what the value is read from, shape (b, H)."""
        value: torch.Tensor = self.critic(flat.view(flat.shape[0], CANDIDATES_MAX, -1))
        return value


class ResidualPolicy(MaskableActorCriticPolicy):
    """Actor and critic of the residual network."""

    def __init__(self, *args: Any, hidden: int = 64, **kwargs: Any) -> None:
        self._hidden = hidden
        super().__init__(*args, **kwargs)

    @property
    def residual(self) -> Residual:
        """Return the network that is exported."""
        heads: Any = self.mlp_extractor
        found: Residual = heads.residual
        return found

    def _build_mlp_extractor(self) -> None:
        heads: Any = Heads(self._hidden)  # the base class says MlpExtractor, and asks only this
        self.mlp_extractor = heads

    def _build(self, lr_schedule: Any) -> None:
        """Build, without the layer that would mix the candidates, and without re-initialising f."""
        super()._build(lr_schedule)
        self.action_net = nn.Identity()
        nn.init.zeros_(self.residual.layer4.weight)
        nn.init.zeros_(self.residual.layer4.bias)
        nn.init.constant_(self.value_net.bias, -1.0)  # where values are: see `training.ppo`
        make: Any = self.optimizer_class
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
