"""A tied head that looks at its own first distribution before it settles on the last.

    p = softmax(scale u E^T)      e = sum of the rows of E of the m likeliest, by their renormalised p
    u' = u + sigmoid(g) W e, at the length of u

for at most `steps` steps; a token whose entropy(p) / ln V is below the threshold stays as it is. The
loss is that of the last distribution over the whole vocabulary, normalised like any other. With W = 0,
as it starts, this is the tied head to the last bit (with another LayerNorm in the place of the kept
length it would not be).

Letters: N tokens, U width of the table, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from sra_ds.config.model import PreManifestHeadConfig
from sra_ds.layers import ZeroLinear
from sra_ds.model.facts import Facts
from sra_ds.model.heads.tied import HeadOutput, TiedTable, score
from sra_ds.ops.candidates import candidates, mean_candidate
from sra_ds.ops.linear_cross_entropy import linear_cross_entropy


class PreManifestHead(nn.Module):
    """h -> logits, or with targets the summed loss; `threshold` may be changed after training."""

    def __init__(self, config: PreManifestHeadConfig, table_width: int) -> None:
        super().__init__()
        self.config, self.table_width = config, table_width
        self.chunk_tokens, self.threshold = config.chunk_tokens, config.threshold
        self.logit_scale = nn.Parameter(torch.empty(1))
        if config.steps:
            self.move = ZeroLinear(table_width, table_width, bias=False)
            self.update_gate = nn.Parameter(torch.empty(1))

    def forward(
        self, h_ND: Tensor, table: TiedTable, targets_N: Tensor | None = None
    ) -> HeadOutput:
        """Logits in float32 at least; with targets at most `chunk_tokens` x V of them at a time."""
        u_NU, weight_VU = table.output_factors(h_ND)
        supervised = self.config.deep_supervision and self.training
        facts: Facts = {}
        early: list[Tensor] = []
        for number in range(self.config.steps):
            if supervised and targets_N is not None:
                scaled_NU = self.logit_scale * u_NU
                loss = linear_cross_entropy(scaled_NU, weight_VU, targets_N, self.chunk_tokens)
                early.append(loss[0])
            u_NU, found = self._refine(u_NU, weight_VU)
            facts |= {f"step{number}_{name}": value for name, value in found.items()}
        if early:
            facts["penalties"] = {"supervision": torch.stack(early).mean()}
        scored = score(self.logit_scale * u_NU, weight_VU, targets_N, self.chunk_tokens)
        return scored._replace(facts=facts)

    def _refine(self, u_NU: Tensor, weight_VU: Tensor) -> tuple[Tensor, Facts]:
        """One step of the tokens that are not sharp yet."""
        scaled_NU = self.logit_scale * u_NU
        count = min(self.config.candidates, len(weight_VU))
        found = candidates(scaled_NU, weight_VU, count, self.chunk_tokens)
        entropy_N = found.entropy_N / math.log(len(weight_VU))
        going_N = entropy_N >= self.threshold
        facts = {"entropy": entropy_N.mean(), "refined_share": going_N.float().mean()}
        rows = going_N.nonzero().squeeze(1)
        own = type(found)(*(part[rows] for part in found))
        mean_RU = mean_candidate(scaled_NU[rows], weight_VU, own)
        before_RU = u_NU[rows]
        moved_RU = before_RU + self.update_gate.sigmoid() * self.move(mean_RU)
        length_R1 = before_RU.norm(dim=-1, keepdim=True) / moved_RU.norm(dim=-1, keepdim=True)
        return u_NU.index_copy(0, rows, moved_RU * length_R1), facts
