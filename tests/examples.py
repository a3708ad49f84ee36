"""Samples of token ids that several tests look at, and strategies that make others."""

from hypothesis import strategies as st

from pd_jax.layout import Branch, TokenSample

EOS = 99
B, Q1, Q2, Q3 = list(range(1, 9)), [11, 12, 13, 14], [21, 22, 23], [31, 32]
WORKED = TokenSample(B, [Branch(Q1), Branch(Q2), Branch(Q3)])  # the worked example of `pd_jax.layout`
# Rows and columns: B0 B1, Q1[0] Q2[0], Q1[1], A1[0] A2[0], A1[1]
SMALL = TokenSample([1, 2], [Branch([11, 12], [41, 42]), Branch([21], [51])])
# Two branches, the trunk, a third branch: the second example of `pd_jax.layout`
STORY = TokenSample(
    [1, 2], [Branch([11, 12], [41, 42]), Branch([21], [51], EOS)], later=[Branch([61], [62], EOS), [Branch([71], [72])]]
)

ids = st.lists(st.integers(1, 90), max_size=6)
branches = st.builds(Branch, st.lists(st.integers(1, 90), min_size=1, max_size=6), ids, st.sampled_from([None, EOS]))
samples = st.builds(TokenSample, ids, st.lists(branches, min_size=1, max_size=4))
joins = st.builds(Branch, ids, ids, st.sampled_from([None, EOS]))
stories = st.builds(
    TokenSample,
    ids,
    st.lists(branches, max_size=4),
    later=st.lists(joins | st.lists(branches, min_size=1, max_size=3), max_size=4),
)
aligns = st.sampled_from(["left", "right", "ragged"])
