"""Plans: what training and decoding would need on a machine that is not there.

The flags can be had without jax; the rest imports it with its first use.
"""

from typing import TYPE_CHECKING, Any

from pd_jax.planning.flags import PlanFlags

if TYPE_CHECKING:
    from pd_jax.planning.plan import Plan, plan_decoding, plan_training, report

__all__ = ["Plan", "PlanFlags", "plan_decoding", "plan_training", "report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pd_jax.planning import plan

        return getattr(plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
