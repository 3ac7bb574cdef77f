"""Expert widths from a budget of parameters, and the page that tells what an injection adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import sizing
import zoo

from moe_adapter import inject_dual_path_moe, plan_injection

BUDGETS = {
    "as text": ("60k", {}),
    "as a number": (123_456, {}),
    "another proportion": ("200K", dict(expert_dim=64, shared_expert_dim=64)),
    "shares": ("0.3M", dict(expert_dim=0.5, shared_expert_dim=1.0)),
    "no shared expert": ("60k", dict(shared_expert_dim=0)),
    "no routed experts": ("60k", dict(num_experts=0)),
    "token mixing, one layer": ("60k", dict(mixing="token", layers=(1,))),
}


@pytest.mark.parametrize("name", ["qwen2", "phi"])
@pytest.mark.parametrize("case", BUDGETS)
def test_a_budget_is_met_as_nearly_as_steps_of_8_allow(case, name):
    budget, overrides = BUDGETS[case]
    limit = int(float(budget[:-1]) * {"k": 1e3, "m": 1e6}[budget[-1].lower()]) if isinstance(budget, str) else budget
    model = zoo.build(name)
    plan = plan_injection(model, budget=budget, **overrides)
    routed, shared = plan.config.expert_dim, plan.config.shared_expert_dim
    assert plan.added <= limit
    wanted = plan_injection(model, **overrides).rows[0]
    widths = [("expert_dim", routed, wanted.expert_dim), ("shared_expert_dim", shared, wanted.shared_expert_dim)]
    present = [(field, width, goal) for field, width, goal in widths if goal]
    assert all(width % 8 == 0 and width > 0 for _, width, _ in present)
    scales = [(width + 4) / goal for _, width, goal in present], [(width - 4) / goal for _, width, goal in present]
    assert min(scales[0]) >= max(scales[1]), "one scale, rounded to multiples of 8, gives both widths"
    field, width, _ = min(present, key=lambda part: (part[1] + 4) / part[2])  # the width that steps up next
    assert (
        plan_injection(
            model, **{**overrides, "expert_dim": routed, "shared_expert_dim": shared, field: width + 8}
        ).added
        > limit
    )


def test_injection_takes_a_budget_too():
    model = inject_dual_path_moe(zoo.build("qwen2"), budget="100k")
    assert 90_000 < sum(p.numel() for p in model.parameters() if p.requires_grad) <= 100_000


def test_table_8_is_the_answer_to_its_own_budget():
    model = zoo.build("qwen2")
    table = plan_injection(model)
    assert plan_injection(model, budget=table.added).config == table.config
    assert plan_injection(model, budget=table.added - 1).config.shared_expert_dim == 5624


def test_the_sizing_page_is_what_its_command_writes():
    page = Path(__file__).parent.parent / "docs" / "sizing.md"
    assert page.read_text(encoding="utf-8") == sizing.page()
