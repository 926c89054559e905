"""The measured plans."""

from typing import get_args

from gradfilter.grads._microbatch import Plan

PLANS = tuple(plan for plan in get_args(Plan) if plan != "auto")
"""All plans of microbatch_grads, so that a new plan is also measured."""
