"""Tests of brain.py: the derivation checks first, then real tiny models, then whole runs."""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gzip
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import huggingface_hub
import numpy
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

import brain

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)  # more cost more than they give on tensors as small as these
EOS = "<|endoftext|>"
WORDS = """a bad be best blue can cat day do dog for good he how i in is it me my no not of on one
or red say so sun that the they to up was we what why will yes you . , ? !""".split()


def build_tokenizer(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Pythia's conventions in small: byte-level BPE, eos = bos = unk = id 0, no pad token. With
    `bos`, a <s> of its own is put before every text, as Llama's tokenizer does."""
    special = [EOS] + (["<s>"] if bos else [])
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    texts = [f" {a} {b}\n" for a in WORDS for b in WORDS]
    texts += ["\n\nHuman: \n\nAssistant: SUBREDDIT: r/ TITLE: POST: TL;DR:"] * 9
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>" if bos else EOS, eos_token=EOS, unk_token=EOS)


def build_config(family: str = "gpt_neox", **changes) -> transformers.PretrainedConfig:
    """A config of two layers and 32 dimensions; more ids than the tokenizer has tokens."""
    shared = dict(vocab_size=416, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    wide = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                max_position_embeddings=640)
    if family == "gpt2":  # absolute positions, dropout 0.1
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=640, **shared,
                                       **changes)
    kind = {"gpt_neox": transformers.GPTNeoXConfig, "llama": transformers.LlamaConfig}[family]
    return kind(**{**shared, **wide, **changes})


def build_model(family: str = "gpt_neox", reward: bool = False, seed: int = 0, **changes):
    """A causal LM, or a classifier of one label, with random weights large enough to matter."""
    torch.manual_seed(seed)
    changes |= dict(initializer_range=0.3) | (dict(num_labels=1) if reward else {})
    kind = (transformers.AutoModelForSequenceClassification if reward else
            transformers.AutoModelForCausalLM)
    return kind.from_config(build_config(family, **changes)).eval()


def save_checkpoint(folder: Path, family: str = "gpt_neox", **options) -> str:
    """A checkpoint with its tokenizer in the Hugging Face format; returns the folder's name."""
    build_model(family, **options).save_pretrained(folder)
    build_tokenizer(bos=family == "llama").save_pretrained(folder)
    return str(folder)


def write_lines(path: Path, rows: list) -> Path:
    """Rows as a .jsonl file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- The loss, proved against its relatives: float64, each identity on a second path -------------


KL = 0.7  # kl_coef ≠ 1, so that multiplying by it instead of dividing shows
BASELINES = ("none", "unnormalized", "self_normalized")
ARGUMENTS = ("log_policy", "log_prior", "log_proposal", "reward", "kl_coef")


def draw(*shape, seed=0, scale=1.0):
    """Standard normal float64 numbers times scale, always the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def loss_and_gradient(log_policy, *rest, **dials):
    """brain_loss (B,) and its gradient by log_policy (B, n), by autograd."""
    leaf = log_policy.clone().requires_grad_()
    loss, _ = brain.brain_loss(leaf, *rest, **dials)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def shares(weights):
    """Rows divided by their sum."""
    return weights / weights.sum(-1, keepdim=True)


def closed_form(log_policy, log_prior, log_proposal, reward, kl_coef):
    """α̂ and exp(ρ) in exp and sum alone."""
    alpha_hat = shares((log_prior + reward / kl_coef - log_proposal).exp())
    return alpha_hat, (log_policy - log_proposal).exp()


def close(got, want, tolerance=1e-12):
    """Equal up to an absolute difference of tolerance."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def kl_divergence(p, q):
    """Σ p log(p/q) over the last axis, of explicit tables."""
    return (p * (p / q).log()).sum(-1)


class Enumerated:
    """A response space Y small enough to know: tables of policy, proposal, prior and posterior."""

    def __init__(self, size=4, seed=1, scale=1.0):
        *logits, self.reward = draw(4, size, seed=seed, scale=scale)
        self.policy, self.prior, self.proposal = (shares(x.exp()) for x in logits)
        self.logits = logits[0]  # the policy's
        self.posterior = shares(self.prior * (self.reward / KL).exp())

    def tuples(self, n):
        """All |Y|ⁿ tuples of responses (tuples, n) and their probability under the proposal."""
        index = torch.tensor(list(itertools.product(range(len(self.policy)), repeat=n)))
        return index, self.proposal[index].prod(-1)

    def inputs(self, index, policy=None):
        """What brain_loss takes for the tuples in index."""
        policy = self.policy if policy is None else policy
        tables = (policy.log(), self.prior.log(), self.proposal.log(), self.reward)
        return *(table[index] for table in tables), KL

    def estimates(self, index, **dials):
        """BRAIn's gradient by the policy's logits for each tuple in index: (tuples, |Y|)."""
        gradient = loss_and_gradient(*self.inputs(index), **dials)[1]  # by log q_θ(yᵢ)
        nothing = gradient.new_zeros(len(index), len(self.policy))
        by_response = nothing.scatter_add(1, index, gradient)
        return by_response - gradient.sum(-1, keepdim=True) * self.policy  # ∇log softmax = 1[y] − q

    def expected_gradient(self, n):
        """Its expectation over n samples of the proposal as one integral, any n, no tuples."""
        a, w = self.posterior / self.proposal, self.policy / self.proposal
        difference = shared_integral(a, self.proposal, n) - shared_integral(w, self.proposal, n)
        return -n * self.proposal * difference


def half_line(step=0.25, low=-30.0, high=20.0):
    """Nodes and weights of ∫₀^∞ f(t) dt, f decaying like e^−t: the trapezoid rule in log t."""
    nodes = torch.arange(low, high, step, dtype=torch.float64).exp()
    return nodes, nodes * step


def shared_integral(values, probability, n):
    """E[v_y / (v_y + Σ of n−1 drawn v)] per y: ∫ v_y e^(−t v_y) M(t)^(n−1) dt, M = E e^(−tv)."""
    t, weight = half_line()
    decay = (-t[:, None] * values).exp()  # (t, |Y|)
    others = (decay * probability).sum(-1) ** (n - 1)
    return (weight * others) @ (values * decay)


# -- One loss, its gradient, and what must not reach the gradient ---------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("shape", [(1, 2), (4, 3), (3, 8), (2, 64)])
def test_gradient_is_alpha_hat_minus_the_baseline(baseline, shape):
    """Catches a baseline dropped or of the wrong sign, α̂ without prior, proposal or 1/kl."""
    inputs = *draw(4, *shape, seed=2), KL
    alpha_hat, ratio = closed_form(*inputs)
    n = shape[-1]
    b, normaliser = {
        "none": (torch.zeros_like(ratio), 0),
        "unnormalized": (ratio / n, ratio.mean(-1) - 1),
        "self_normalized": (shares(ratio), ratio.mean(-1).log()),
    }[baseline]
    loss, gradient = loss_and_gradient(*inputs, baseline=baseline)
    close(gradient, -(alpha_hat - b))
    close(loss, (alpha_hat * (n * alpha_hat / ratio).log()).sum(-1) + normaliser)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("attached", ["log_prior", "log_proposal", "reward", "all"])
def test_only_log_policy_carries_a_gradient(baseline, attached):
    """Catches a gradient let through α̂ or the proposal, seen only if one leaf stands there too."""
    leaf, *rest = draw(4, 3, 5, seed=3)
    leaf.requires_grad_()
    inputs = [leaf if attached in (name, "all") else value
              for name, value in zip(ARGUMENTS[1:], rest, strict=False)]
    loss, weights = brain.brain_loss(leaf, *inputs, KL, baseline=baseline)
    with torch.no_grad():
        alpha_hat, ratio = closed_form(leaf, *inputs, KL)
        b = {"none": 0, "unnormalized": ratio / 5, "self_normalized": shares(ratio)}[baseline]
    close(torch.autograd.grad(loss.sum(), leaf)[0], b - alpha_hat)
    assert not any(weight.requires_grad for weight in weights)


def test_reverse_detaches_all_but_log_policy():
    """Catches a gradient through α̂ in KL(β̂ ‖ α̂), where the leaf is prior and proposal too."""
    leaf, reward = draw(2, 3, 5, seed=4)
    leaf.requires_grad_()
    loss, _ = brain.brain_loss(leaf, leaf, leaf, reward, KL, divergence="reverse")
    advantage = reward - reward.mean(-1, keepdim=True)  # ρ = 0, β̂ = 1/n
    close(torch.autograd.grad(loss.sum(), leaf)[0], -advantage / (5 * KL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dials", [{"baseline": name} for name in BASELINES] + [
    {"target": "argmax"}, {"divergence": "reverse"}], ids=lambda dials: next(iter(dials.values())))
def test_dtype_kept_and_inputs_unchanged(dtype, dials):
    """Catches a stray cast, a default-dtype constant, an in-place edit of the caller's tensors."""
    inputs = [x.to(dtype) for x in draw(4, 2, 6, seed=5)]
    before = [x.clone() for x in inputs]
    loss, weights = brain.brain_loss(*inputs, KL, **dials)
    assert (loss.dtype, loss.shape) == (dtype, (2,))
    for weight in weights:
        assert (weight.dtype, weight.shape) == (dtype, (2, 6))
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x, old) and x.grad is None


def test_float32_agrees_with_float64():
    """Catches a loss that loses digits in the dtype that trainers use."""
    inputs = draw(4, 5, 8, seed=6)
    for baseline in BASELINES:
        exact = brain.brain_loss(*inputs, KL, baseline=baseline)[0]
        single = brain.brain_loss(*inputs.float(), KL, baseline=baseline)[0]
        close(single.double(), exact, 3e-6)


def test_returned_weights_are_alpha_hat_and_beta_hat():
    """Catches weights swapped, or reported as something else than what the loss was made from."""
    inputs = *draw(4, 3, 5, seed=7), KL
    alpha_hat, ratio = closed_form(*inputs)
    for weights in (brain.snis_weights(*inputs), brain.brain_loss(*inputs)[1]):
        close(weights.alpha_hat, alpha_hat)
        close(weights.beta_hat, shares(ratio))


@pytest.mark.parametrize("change, message", [
    ({"target": "max"}, "target"), ({"baseline": "mean"}, "baseline"),
    ({"divergence": "backward"}, "divergence"), ({"kl_coef": 0.0}, "kl_coef"),
    ({"kl_coef": -1.0}, "kl_coef"), ({"kl_coef": math.nan}, "kl_coef"),
    ({"reward": draw(3, 1)}, "shape"), ({"log_policy": draw(5)}, "shape"),
    ({"log_prior": draw(1, 5)}, "shape"), ({"log_proposal": draw(3, 4)}, "shape"),
    ({"divergence": "reverse", "target": "argmax"}, "reverse"),
    ({"divergence": "reverse", "baseline": "none"}, "reverse"),
    ({"divergence": "reverse", "baseline": "unnormalized"}, "reverse"),
    ({"kl_coef": 0.0, "target": "argmax"}, "kl_coef"),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_bad_input_is_a_value_error(change, message):
    """Catches a dial's typing error taken for a default, and shapes that broadcast in silence."""
    arguments = dict(zip(ARGUMENTS, (*draw(4, 3, 5, seed=8), KL), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        brain.brain_loss(**arguments)


# -- Zero, invariances, extremes ------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_zero_at_the_optimum_for_every_tuple(divergence, n):
    """Catches α̂ and β̂ not built alike: at policy = posterior no tuple may leave a gradient."""
    space = Enumerated(size=4, seed=9, scale=2.0)
    index, _ = space.tuples(n)
    loss, gradient = loss_and_gradient(*space.inputs(index, space.posterior), divergence=divergence)
    close(loss, torch.zeros_like(loss))
    close(gradient, torch.zeros_like(gradient))


def test_the_loss_is_bounded_below_where_it_should_be():
    """Catches a lost constant: KL-like losses are ≥ 0, `none` sinks with ρ, argmax tends to 0."""
    policy, prior, proposal, reward = inputs = draw(4, 500, 6, seed=10, scale=2.0)
    bounded = {}, {"baseline": "unnormalized"}, {"divergence": "reverse"}, {"target": "argmax"}
    for dials in bounded:
        assert brain.brain_loss(*inputs, KL, **dials)[0].min() > 0
    none = brain.brain_loss(*inputs, KL, baseline="none")[0]
    lifted = brain.brain_loss(policy + 1000, prior, proposal, reward, KL, baseline="none")[0]
    close(lifted, none - 1000, 1e-9)
    best = (reward == reward.amax(-1, keepdim=True)) * 30.0  # e⁻³⁰ is about 1e-13
    assert brain.brain_loss(proposal + best, *inputs[1:], KL, target="argmax")[0].max() < 1e-11


def far_sample(inputs, size):
    """One sample of each prompt moved far out in the policy, up for even and down for odd rows."""
    policy, *rest = (x.clone() for x in inputs)
    policy[::2, 0] += size
    policy[1::2, 0] -= size
    return policy, *rest


EXTREMES = {  # name: (change of the four tensors, kl_coef)
    "plain": (lambda x: x, KL),
    "equal rewards": (lambda x: (*x[:3], torch.zeros_like(x[3])), KL),
    "ties": (lambda x: (*x[:3], x[3].round().clamp(-1, 1)), KL),
    "sharp": (lambda x: x, 1e-3),
    "flat": (lambda x: x, 1e3),
    "wide policy": (lambda x: (1e4 * x[0].sign(), x[1], torch.zeros_like(x[2]), x[3]), KL),
    "wide proposal": (lambda x: (x[0], x[1], 1e4 * x[2].sign(), x[3]), KL),
    "all far": (lambda x: (x[0] - 1e4, x[1] - 2e4, x[2] + 1e4, x[3] + 5e3), KL),
    "one far out": (lambda x: far_sample(x, 1e4), KL),
}
DIALS = [{}, {"baseline": "none"}, {"baseline": "unnormalized"}, {"target": "argmax"},
         {"divergence": "reverse"}]
CASES = [pytest.param(extreme, dials, id=f"{extreme}-{next(iter(dials.values()), 'default')}")
         for extreme in EXTREMES for dials in DIALS  # exp(ρ) of unnormalized overflows by nature
         if dials != {"baseline": "unnormalized"} or list(EXTREMES).index(extreme) < 5]
SHAPES = [(1, 2), (6, 64), *zip(
    torch.randint(1, 6, (3,), generator=torch.Generator().manual_seed(11)).tolist(),
    torch.randint(3, 64, (3,), generator=torch.Generator().manual_seed(12)).tolist(), strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extreme, dials", CASES)
def test_finite_normalised_and_invariant(extreme, dials, shape):
    """Catches log(0), 0·log 0, overflow, a softmax over prompts, and a sample's place or a constant
    added to a prompt's rewards that changes its weights."""
    change, kl_coef = EXTREMES[extreme]
    inputs = change(draw(4, *shape, seed=13))
    target = dials.get("target", "posterior")
    loss, gradient = loss_and_gradient(*inputs, kl_coef, **dials)
    weights = brain.snis_weights(*inputs, kl_coef, target)
    assert loss.isfinite().all() and gradient.isfinite().all()
    for weight in weights:
        assert (weight >= 0).all()
        close(weight.sum(-1), torch.ones(shape[0], dtype=torch.float64), 1e-11)

    # Tolerances: rounding in proportion to the largest exponent, a few units in the last place.
    tolerance = 1e-15 * (10 + max(x.abs().max().item() for x in (*inputs, inputs[3] / kl_coef)))
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(14))
    permuted = [x[:, order] for x in inputs]
    moved_loss, moved_gradient = loss_and_gradient(*permuted, kl_coef, **dials)
    close(moved_loss, loss, 10 * tolerance)
    close(moved_gradient, gradient[:, order], 10 * tolerance)
    for weight, moved in zip(weights, brain.snis_weights(*permuted, kl_coef, target), strict=True):
        close(moved, weight[:, order], tolerance)

    c = torch.arange(1, shape[0] + 1, dtype=torch.float64)[:, None]  # c(x), one per prompt
    tolerance += 1e-15 * shape[0] / kl_coef
    shifted_loss, shifted_gradient = loss_and_gradient(*inputs[:3], inputs[3] + c, kl_coef, **dials)
    close(shifted_loss, loss, 100 * tolerance)
    close(shifted_gradient, gradient, 10 * tolerance)


@pytest.mark.parametrize("position", [0, 1, 2], ids=ARGUMENTS[:3])
def test_normalising_constants_cancel(position):
    """Catches a share that is not self-normalised: a constant such as log Z(x) must drop out."""
    inputs = list(draw(4, 3, 5, seed=15))
    before, gradient_before = loss_and_gradient(*inputs, KL)
    inputs[position] = inputs[position] + torch.tensor([[2.0], [-3.0], [7.0]])
    after, gradient_after = loss_and_gradient(*inputs, KL)
    close(after, before)
    close(gradient_after, gradient_before)


def test_ties_share_the_argmax():
    """Catches ties that go to the first sample alone, and kl_coef or the prior felt by argmax."""
    inputs = list(draw(4, 4, 4, seed=16))
    inputs[3] = torch.tensor([[1, 3, 3, 0], [2, 2, 2, 2], [0, 1, 5, 5], [4, 0, 1, 4]]).double()
    want = torch.tensor([[0, .5, .5, 0], [.25, .25, .25, .25], [0, 0, .5, .5], [.5, 0, 0, .5]])
    for kl_coef in (1e-3, 0.7, 1e3):
        close(brain.snis_weights(*inputs, kl_coef, "argmax").alpha_hat, want.double())


def test_argmax_is_the_limit_of_small_kl_coef():
    """Catches an argmax of something else than the reward: α̂ tends to it as kl_coef tends to 0."""
    policy, prior, proposal, reward = draw(4, 20, 5, seed=17)
    reward = reward.argsort(-1).argsort(-1).double()  # distances of 1 between the ranks
    limit, argmax = (brain.snis_weights(policy, prior, proposal, reward, 1e-2, target).alpha_hat
                     for target in ("posterior", "argmax"))
    close(argmax, limit)


def test_bradley_terry_loss():
    """Catches chosen and rejected swapped, a missing log, and overflow at far apart rewards."""
    chosen, rejected = draw(2, 50, seed=18, scale=3.0)
    worth_chosen, worth_rejected = chosen.exp(), rejected.exp()
    close(brain.bradley_terry_loss(chosen, rejected),
          -(worth_chosen / (worth_chosen + worth_rejected)).log())
    far = torch.tensor([1e4, -1e4, 0.0], dtype=torch.float64)
    want = torch.tensor([0.0, 1e4, math.log(2)], dtype=torch.float64)
    close(brain.bradley_terry_loss(far, torch.zeros_like(far)), want)


def test_effective_sample_size():
    """Catches a missing square or reciprocal: k equal weights count k, unequal ones fewer."""
    weights = torch.tensor([[.25, .25, .25, .25], [0, 1, 0, 0], [.5, 0, .5, 0], [.6, .4, 0, 0]])
    want = torch.tensor([4, 1, 2, 1 / .52])
    close(brain.effective_sample_size(weights), want, 1e-6)
    random = shares(draw(100, 9, seed=19, scale=3.0).exp())
    explicit = [1 / sum(w * w for w in row) for row in random.tolist()]
    close(brain.effective_sample_size(random), torch.tensor(explicit, dtype=torch.float64))


# -- Relatives: DPO, InfoNCA, the policy gradients ------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.1, 2.5])
@pytest.mark.parametrize("kl_coef", [1e-3, 0.7, 50.0])
@pytest.mark.parametrize("labels", ["rewards", "one and zero"])
def test_dpo(beta, kl_coef, labels):
    """Catches argmax, n = 2 and proposal = prior that are not DPO: −log σ(β Δ log(q/p)) and its
    gradient, whatever kl_coef, on samples labelled by reward and on pairs labelled 1 and 0."""
    policy, prior, reward = draw(3, 40, 2, seed=20)
    if labels == "one and zero":
        reward = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(40, 2)
    leaf = policy.clone().requires_grad_()
    loss, _ = brain.brain_loss(prior + beta * (leaf - prior), prior, prior, reward, kl_coef,
                               target="argmax")
    gradient, = torch.autograd.grad(loss.sum(), leaf)
    for row in range(40):
        chosen = int(reward[row, 1] > reward[row, 0])
        margin = sum((1 if i == chosen else -1) * (policy[row, i] - prior[row, i]).item()
                     for i in (0, 1))
        slope = -beta / (1 + math.exp(beta * margin))  # −β σ(−βΔ)
        assert loss[row].item() == pytest.approx(math.log1p(math.exp(-beta * margin)), abs=1e-12)
        assert gradient[row, chosen].item() == pytest.approx(slope, abs=1e-12)
        assert gradient[row, 1 - chosen].item() == pytest.approx(-slope, abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 32])
def test_infonca(n):
    """Catches a target or a score of the soft contrastive loss that is off: with proposal = prior,
    −Σ softmax(r/kl_coef) log softmax(log q/p), less the entropy of its target."""
    policy, prior, reward = draw(3, 10, n, seed=21)
    leaf = policy.clone().requires_grad_()
    target = shares((reward / KL).exp())
    infonca = -(target * shares((leaf - prior).exp()).log()).sum(-1)
    loss, gradient = loss_and_gradient(policy, prior, prior, reward, KL)
    entropy = -(target * target.log()).sum(-1)
    close(loss, infonca.detach() - entropy)
    close(gradient, torch.autograd.grad(infonca.sum(), leaf)[0])


@pytest.mark.parametrize("kl_coef", [0.1, 0.7, 3.0])
def test_ppo_has_the_same_objective(kl_coef):
    """Catches reverse with its arguments swapped or a wrong posterior: for every policy q over Y,
    E_q[r] − kl_coef·KL(q‖p) + kl_coef·KL(q‖posterior) = kl_coef·log Z."""
    logits, prior, reward = draw(3, 200, 6, seed=22)
    policy, prior = shares(logits.exp()), shares(prior.exp())
    uniform = torch.full_like(policy, 1 / 6)  # every response once, all with one q′
    to_posterior, _ = brain.brain_loss(policy.log(), prior.log(), uniform.log(), reward, kl_coef,
                                       divergence="reverse")
    objective = (policy * reward).sum(-1) - kl_coef * kl_divergence(policy, prior)
    log_z = (prior * (reward / kl_coef).exp()).sum(-1).log()
    close(objective + kl_coef * to_posterior, kl_coef * log_z, 1e-11)


@pytest.mark.parametrize("n", [2, 3, 16])
def test_reverse_is_the_regularised_policy_gradient(n):
    """Catches KL(β̂ ‖ α̂) with swapped arguments, a baseline that is not the β̂-mean of R, and a
    proposal that is left out."""
    inputs = policy, prior, proposal, reward = draw(4, 10, n, seed=23)
    beta_hat = shares((policy - proposal).exp())
    regularised = reward - KL * (policy - prior)
    loss, gradient = loss_and_gradient(*inputs, KL, divergence="reverse")
    for row in range(10):
        b, rewards = beta_hat[row].tolist(), regularised[row].tolist()
        mean = sum(weight * value for weight, value in zip(b, rewards, strict=True))
        want = [-w * (value - mean) / KL for w, value in zip(b, rewards, strict=True)]
        close(gradient[row], torch.tensor(want, dtype=torch.float64))
    close(loss, kl_divergence(beta_hat, closed_form(*inputs, KL)[0]))


@pytest.mark.parametrize("n", [2, 3, 16])
def test_reverse_on_policy_is_rloo_grpo_and_ppo(n):
    """Catches a wrong factor between the relatives: kl_coef·n/(n−1) to RLOO's leave-one-out mean,
    kl_coef to GRPO and to PPO's first step (clipped, ratio 1, group mean for the critic)."""
    tokens, prior = draw(2, 4, n, 3, seed=24)  # (B, n, T) log-probabilities of tokens
    reward = draw(4, n, seed=25)
    leaf = tokens.clone().requires_grad_()
    policy = leaf.sum(-1)
    loss, _ = brain.brain_loss(policy, prior.sum(-1), policy, reward, KL, divergence="reverse")
    gradient, = torch.autograd.grad(loss.sum(), leaf)

    regularised = reward - KL * (tokens - prior).sum(-1)  # the KL is in the reward
    others = (regularised.sum(-1, keepdim=True) - regularised) / (n - 1)
    rloo = -((regularised - others) * leaf.sum(-1)).mean(-1)
    close(KL * n / (n - 1) * gradient, torch.autograd.grad(rloo.sum(), leaf)[0])

    advantage = (regularised - regularised.mean(-1, keepdim=True))[..., None]  # no std, no 1/|y|
    ratio = (leaf - tokens).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    ppo = -clipped.sum(-1).mean(-1)
    close(KL * gradient, torch.autograd.grad(ppo.sum(), leaf)[0])


@pytest.mark.parametrize("n, order", [(2, 2), (3, 1), (8, 1)])
def test_forward_meets_reverse_for_small_advantages(n, order):
    """Catches a forward gradient that is no policy gradient to first order: on-policy, halving the
    advantages halves the relative difference (quarters it at n = 2, where α̂ − ½ is odd)."""
    policy, prior, advantage = draw(3, 1, n, seed=26)
    gaps = []
    for epsilon in (2e-3, 1e-3):
        reward = epsilon * advantage + KL * (policy - prior)  # R = ε·advantage
        forward, reverse = (
            loss_and_gradient(policy, prior, policy, reward, KL, divergence=divergence)[1]
            for divergence in ("forward", "reverse"))
        gaps.append(((forward - reverse).norm() / reverse.norm()).item())
    assert 0 < gaps[0] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2 ** order, rel=1e-2)


# -- The whole space, and the expectation over samples --------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
def test_enumeration_is_the_true_kl(baseline):
    """Catches a wrong constant (log n, the −1): over all of Y once each the loss is
    KL(posterior ‖ policy), with every baseline, and so is its gradient by the logits."""
    logits, prior, reward = draw(3, 5, 7, seed=27)
    posterior = shares(shares(prior.exp()) * (reward / KL).exp())
    leaf = logits.clone().requires_grad_()
    uniform = torch.full_like(prior, -math.log(7))
    loss, _ = brain.brain_loss(leaf.log_softmax(-1), prior, uniform, reward, KL, baseline=baseline)
    policy = shares(logits.exp())
    close(loss.detach(), kl_divergence(posterior, policy))
    close(torch.autograd.grad(loss.sum(), leaf)[0], policy - posterior)


def explicit_divergence(space, n, logits):
    """D_n = E KL(α̂ ‖ β̂) over n samples of the proposal, from explicit tables, no brain_loss."""
    index, probability = space.tuples(n)
    alpha_hat = shares((space.posterior / space.proposal)[index])
    beta_hat = shares((shares(logits.exp()) / space.proposal)[index])
    return probability @ kl_divergence(alpha_hat, beta_hat)


@pytest.mark.parametrize("size, n", [(3, 2), (4, 3), (5, 4), (3, 6)])
def test_estimator_is_unbiased_for_the_finite_n_divergence(size, n):
    """Catches an estimator that is not the gradient of D_n (Theorem 4.2): its exact expectation
    over all tuples against central differences, and against an integral without tuples."""
    space = Enumerated(size, seed=28)
    index, probability = space.tuples(n)
    close(probability.sum(), torch.ones((), dtype=torch.float64))
    expectation = probability @ space.estimates(index)

    step = 1e-4
    for y, direction in enumerate(torch.eye(size, dtype=torch.float64)):
        above, below = (explicit_divergence(space, n, space.logits + sign * step * direction)
                        for sign in (1, -1))
        close(expectation[y], (above - below) / (2 * step), 1e-7)
    close(expectation, space.expected_gradient(n), 1e-10)
    loss, _ = brain.brain_loss(*space.inputs(index))
    close(probability @ loss, explicit_divergence(space, n, space.logits))


def test_finite_n_divergence_is_zero_at_the_posterior_alone():
    """Catches a loss with another minimiser: D_n is 0 at policy = posterior, positive elsewhere."""
    for seed in range(20):
        space = Enumerated(4, seed=30 + seed)
        index, probability = space.tuples(3)
        at_policy, at_posterior = (probability @ brain.brain_loss(*space.inputs(index, table))[0]
                                   for table in (space.policy, space.posterior))
        assert abs(at_posterior) < 1e-13 and at_policy > 1e-3


def test_finite_n_divergence_is_not_the_true_kl():
    """Catches the claim that D_n is the true KL or bounds it: it is smaller in one example, larger
    in another; the gap between their gradients shrinks with n, and is printed (pytest -s)."""
    space = Enumerated(5, seed=50)
    true = space.policy - space.posterior
    gaps = {n: ((space.expected_gradient(n) - true).norm() / true.norm()).item()
            for n in (2, 4, 8, 16, 32, 64, 128)}
    print("\nrelative gap between the gradients of D_n and of the true KL")
    print("  ".join(f"n={n}: {gap:.1%}" for n, gap in gaps.items()))
    values = list(gaps.values())
    assert all(before > after for before, after in itertools.pairwise(values))
    assert values[-2] / values[-1] == pytest.approx(2, rel=0.05)  # O(1/n) in the end

    smaller = explicit_divergence(space, 2, space.logits)
    assert smaller < 0.9 * kl_divergence(space.posterior, space.policy)
    rare = Enumerated(3)  # differs from the policy where both are small and the proposal large
    rare.posterior = torch.tensor([0.019, 0.001, 0.98], dtype=torch.float64)
    rare.policy = rare.posterior[[1, 0, 2]]
    rare.proposal = torch.tensor([0.49, 0.49, 0.02], dtype=torch.float64)
    larger = explicit_divergence(rare, 2, rare.policy.log())
    assert larger > 2 * kl_divergence(rare.posterior, rare.policy)


def test_bias_falls_like_one_over_n():
    """Catches a bias that does not vanish, such as a normaliser off by a constant factor:
    n × the relative bias of the expected gradient tends to a constant."""
    space = Enumerated(5, seed=50)
    true = space.policy - space.posterior
    scaled = [(n * (space.expected_gradient(n) - true).norm() / true.norm()).item()
              for n in (256, 512, 1024)]
    assert max(scaled) / min(scaled) < 1.05


def test_monte_carlo_agrees_with_the_integral():
    """Catches an integral that is not the estimator's mean at an n too large to enumerate.

    Each of 5 components lies in [−1, 1] and is a mean over 200,000, so the central limit holds:
    leaving 6 standard errors has a probability below 5 · 2e-9 = 1e-8.
    """
    space = Enumerated(5, seed=50)
    index = torch.multinomial(space.proposal.expand(200_000, -1), 8, replacement=True,
                              generator=torch.Generator().manual_seed(51))
    estimates = space.estimates(index)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - space.expected_gradient(8)).abs() < 6 * error).all()


# -- The authors' experiment: posterior N(0,1), policy N(1,1), proposal N(μ,1), n = 8 --------------


AUTHORS = ("DPG, p/(nq′)", "GDC++, (p−q)/(nq′)")  # theirs, with the true Z


class Gaussians:
    """Exact moments of the estimators of −∇KL(posterior ‖ policy) by the policy's mean."""

    def __init__(self, proposal_mean, policy_mean=1.0, n=8):
        y = torch.arange(-16, 16, 0.1, dtype=torch.float64)
        posterior, policy, proposal = (
            torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), 1).log_prob(y).exp()
            for mean in (0.0, policy_mean, proposal_mean))
        a, w = posterior / proposal, policy / proposal
        self.n, self.probability = n, proposal * 0.1  # the trapezoid rule is exact to rounding here
        self.slope, self.true = y - policy_mean, -policy_mean  # ∇log q and E_posterior[∇log q]
        plain = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1 / n, dtype=torch.float64)
        alpha_hat, beta_hat = (a, *half_line()), (w, *half_line())  # 1/S = ∫ exp(−tS) dt
        a_mean, w_mean = (a, *plain), (w, *plain)  # 1/n in place of 1/S
        self.estimators = {  # terms to add and to subtract
            AUTHORS[0]: [(1, a_mean)],
            AUTHORS[1]: [(1, a_mean), (-1, w_mean)],
            "none": [(1, alpha_hat)],
            "unnormalized": [(1, alpha_hat), (-1, w_mean)],
            "BRAIn": [(1, alpha_hat), (-1, beta_hat)],
        }

    def mean(self, term):
        """E of Σ vᵢ fᵢ / S, f = ∇log q, S = Σ v or n, as ∫ n E[v f e^(−tv)] M(t)^(n−1) dt."""
        v, t, weight = term
        decay = (-t[:, None] * v).exp() * self.probability
        return weight @ (self.n * (decay @ (v * self.slope)) * decay.sum(-1) ** (self.n - 1))

    def product(self, one, two):
        """E of the product of two such sums: equal and unequal indices, as a double integral."""
        (v, s, weight_s), (u, t, weight_t) = one, two
        decay_v, decay_u = (-s[:, None] * v).exp() * self.probability, (-t[:, None] * u).exp()
        m = decay_v @ decay_u.T  # E e^(−sv−tu)
        equal = (decay_v * v * u * self.slope ** 2) @ decay_u.T
        first, second = ((decay_v * x * self.slope) @ decay_u.T for x in (v, u))
        n = self.n
        both = n * equal * m ** (n - 1) + n * (n - 1) * first * second * m ** (n - 2)
        return weight_s @ both @ weight_t

    def moments(self, name):
        """Mean and variance of an estimator, and its squared error for the true gradient."""
        terms = self.estimators[name]
        mean = sum(sign * self.mean(term) for sign, term in terms).item()
        second = sum(s * t * self.product(x, y) for s, x in terms for t, y in terms).item()
        variance = second - mean ** 2
        return mean, variance, variance + (mean - self.true) ** 2


def gaussian_estimates(mu, baseline, repeats, seed, n=8):
    """Minus the gradient of brain_loss by the policy's mean, for `repeats` draws of n samples.

    The prior is the policy, N(1,1), and the reward −kl_coef·y makes N(0,1) the posterior.
    """
    y = mu + draw(repeats, n, seed=seed)
    log_policy, log_proposal = -(y - 1) ** 2 / 2, -(y - mu) ** 2 / 2
    gradient = loss_and_gradient(log_policy, log_policy, log_proposal, -KL * y, KL,
                                 baseline=baseline)[1]
    return -(gradient * (y - 1)).sum(-1)


def test_authors_experiment():
    """Catches a table that flatters: exact mean, variance and squared error of five estimators, by
    quadrature, with what lower variance costs in bias. Printed (pytest -s)."""
    table = {mu: {name: space.moments(name) for name in space.estimators}
             for mu, space in ((mu, Gaussians(mu)) for mu in (0.0, 0.5, 1.0))}
    print(f"\n{'proposal':<10}{'estimator':<18}{'mean':>8}{'variance':>10}{'squared error':>15}")
    for mu, rows in table.items():
        for name, (mean, variance, squared) in rows.items():
            print(f"N({mu}, 1)  {name:<18}{mean:8.3f}{variance:10.3f}{squared:15.3f}")

    variance = {mu: {name: row[1] for name, row in rows.items()} for mu, rows in table.items()}
    dpg, gdc = AUTHORS
    for mu in (0.5, 1.0):  # the authors' claim, for their DPG and GDC++
        assert variance[mu]["BRAIn"] < min(variance[mu][dpg], variance[mu][gdc])
    assert variance[0.0][dpg] < variance[0.0]["BRAIn"] < variance[0.0][gdc]  # and where it fails
    want = {0.0: (0.125, 0.555, 0.173), 0.5: (0.397, 0.354, 0.193), 1.0: (1.574, 1.199, 0.173)}
    for mu, values in want.items():
        measured = [variance[mu][name] for name in (dpg, gdc, "BRAIn")]
        assert measured == pytest.approx(values, abs=6e-4)
        for name in AUTHORS:
            assert table[mu][name][0] == pytest.approx(-1, abs=1e-10)  # unbiased
        assert -0.85 < table[mu]["BRAIn"][0] < -0.76  # BRAIn is not
    assert variance[0.5]["none"] < variance[0.5]["BRAIn"] < variance[0.5]["unnormalized"]
    assert table[0.5]["none"][2] < table[0.5]["BRAIn"][2]
    assert table[1.0]["unnormalized"] == pytest.approx(table[1.0]["BRAIn"], abs=1e-9)  # on-policy
    assert table[0.0][dpg] == pytest.approx(table[0.0]["none"], abs=1e-9)  # proposal = posterior


def test_authors_experiment_at_the_optimum():
    """Catches a baseline that does not cancel at policy = posterior = N(0,1), proposal N(2,1):
    BRAIn and GDC++ with a known Z are exactly 0; those that share α̂ but not β̂ are far off."""
    space = Gaussians(2.0, policy_mean=0.0)
    variance = {name: space.moments(name)[1] for name in space.estimators}
    assert variance["BRAIn"] == pytest.approx(0, abs=1e-9)
    assert variance[AUTHORS[1]] == pytest.approx(0, abs=1e-9)
    assert variance["none"] == pytest.approx(0.4187, abs=1e-3)
    assert variance["unnormalized"] == pytest.approx(32.98, abs=1e-1)


@pytest.mark.parametrize("baseline, name", [("none", "none"), ("self_normalized", "BRAIn")])
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_brain_loss_has_the_moments_of_the_table(mu, baseline, name):
    """Catches a loss whose gradient is not the estimator in the table.

    An estimate is at most 2 max |y − 1| in size, so its tails are Gaussian and the central limit
    holds for mean and variance over 200,000: leaving 6 standard errors has a probability of about
    2e-9 each (skewness adds a small factor), below 1e-7 in all 12.
    """
    mean, variance, _ = Gaussians(mu).moments(name)
    estimates = gaussian_estimates(mu, baseline, repeats=200_000, seed=60)
    square = (estimates - mean) ** 2
    for values, want in ((estimates, mean), (square, variance)):
        assert abs(values.mean().item() - want) < 6 * values.std().item() / math.sqrt(len(values))


def test_on_policy_unnormalized_is_brain():
    """Catches an exp(ρ)/n without its 1/n: on-policy it is β̂, sample by sample."""
    one, other = (gaussian_estimates(1.0, baseline, repeats=1000, seed=61)
                  for baseline in ("unnormalized", "self_normalized"))
    close(one, other)


# -- The checks that brain.py itself runs ---------------------------------------------------------


def test_derivation_checks_pass():
    """Catches a built-in check that fails, or that says ok without an error below its tolerance."""
    checks = brain.derivation_checks()
    assert len(checks) >= 4 and len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.ok and 0 <= check.error <= check.tolerance <= 1e-10, check
        assert check.claim


def test_derivation_checks_notice_a_broken_loss(monkeypatch):
    """Catches checks that cannot fail: a loss off by one part in 10⁶ must turn every one."""
    exact = brain.brain_loss
    monkeypatch.setattr(brain, "brain_loss", lambda *inputs, **dials: (
        exact(*inputs, **dials)[0] * (1 + 1e-6), None))
    assert not any(check.ok for check in brain.derivation_checks())


# ------------------------------------------------------------------------------------------------
# Real (tiny) models: scores and rewards against rows written out by hand
# ------------------------------------------------------------------------------------------------

FAMILIES = ["gpt_neox", "gpt2", "llama"]
shared_model = functools.cache(build_model)  # for tests that change nothing in it


def draw_ids(length: int, seed: int) -> list[int]:
    """Random ids without the end-of-text token, which is 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 416, (length,), generator=generator).tolist()


def make_ids(n: int):
    """Prompts of 9, 1 and 4 ids with n responses each, of 1 to 6 ids, two in three with eos."""
    responses = [[draw_ids((3 * i + 2 * b) % 6 + (i % 3 == 2), 100 * b + i + 7) + [0] * (i % 3 != 2)
                  for i in range(n)] for b in range(3)]
    return [draw_ids(length, length) for length in (9, 1, 4)], responses


def loop_score(model, prompt: list[int], response: list[int], temperature: float = 1.0):
    """log q(response | prompt): a forward pass for each token, nothing cached, nothing padded."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]]), use_cache=False).logits[0, -1]
        total = total + (logits.double() / temperature).log_softmax(-1)[token]
    return total


def plain_score(model, prompt: list[int], response: list[int], temperature: float = 1.0):
    """The same from one forward pass over one row."""
    row = torch.tensor([prompt + response])
    logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1)[range(len(response)), response].sum()


def table_of(score, model, prompts, responses, *options):
    """A (B, n) tensor of score(model, prompt, response), one call each."""
    return torch.stack([torch.stack([score(model, x, y, *options) for y in ys])
                        for x, ys in zip(prompts, responses, strict=True)])


def assert_same_gradients(model, ours, theirs) -> None:
    """A random weighting of two (B, n) tensors has the same gradient in every parameter."""
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    pairs = zip(*(torch.autograd.grad((weight * of).sum(), parameters, allow_unused=True)
                  for of in (ours, theirs)), strict=True)
    pairs = [(a, b) for a, b in pairs if a is not None or b is not None]
    largest = max(b.abs().max() for _, b in pairs)
    assert largest > 0.1
    for a, b in pairs:  # measured: 2e-6 of the largest
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * largest.item())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_plain_row_is_the_token_loop(family):
    """Catches a mistake in the oracle of the tests below: a row read one position off, or a model
    that sees the future."""
    model, (prompts, responses) = shared_model(family), make_ids(3)
    for temperature in (1.0, 0.7):
        loop, plain = (table_of(score, model, prompts, responses, temperature)
                       for score in (loop_score, plain_score))
        torch.testing.assert_close(plain, loop, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_score_and_gradient_are_those_of_plain_rows(family, n):
    """Catches positions that do not restart for a branch, a branch that sees its neighbour or the
    left padding, a mean over tokens, a token or an end-of-text left out, branches mixed up by the
    layout, and a prompt without its gradient."""
    model, (prompts, responses) = shared_model(family), make_ids(n)
    packed = brain.sequence_log_prob(model, brain.pack(prompts, responses))
    plain = table_of(plain_score, model, prompts, responses)
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, plain.float(), rtol=0, atol=1e-4)  # measured 1e-5
    assert_same_gradients(model, packed, plain)


@torch.no_grad()
def test_packed_score_under_eager_attention():
    """Catches a boolean mask, which sdpa understands and eager attention adds to its scores."""
    model, (prompts, responses) = build_model("llama"), make_ids(4)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(brain.sequence_log_prob(model, brain.pack(prompts, responses)),
                               table_of(plain_score, model, prompts, responses).float(),
                               rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_score_does_not_depend_on_its_company(family):
    """Catches padding, neighbours or branches that leak into a score, and a layout that depends
    on n: each response alone, among others, among far longer ones, and in reverse order."""
    model, (prompts, responses) = shared_model(family), make_ids(6)
    whole = brain.sequence_log_prob(model, brain.pack(prompts, responses))
    for b, x in enumerate(prompts):
        for i, y in enumerate(responses[b]):
            alone = brain.sequence_log_prob(model, brain.pack([x], [[y]]))
            torch.testing.assert_close(alone[0, 0], whole[b, i], rtol=0, atol=1e-4)
    turned = brain.sequence_log_prob(
        model, brain.pack(prompts[::-1], [ys[::-1] for ys in responses[::-1]]))
    torch.testing.assert_close(turned.flip(0, 1), whole, rtol=0, atol=1e-4)
    long = [draw_ids(40, i) for i in range(6)]  # more padding on both sides
    padded = brain.sequence_log_prob(
        model, brain.pack([draw_ids(60, 60), *prompts], [long, *responses]))
    torch.testing.assert_close(padded[1:], whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_end_of_text_is_part_of_the_score(family):
    """Catches an end-of-text token that is left out of the score, or masked because it is also the
    id that pads: without it the score differs by exactly log p(eos | the rest)."""
    model, x, y = shared_model(family), draw_ids(5, 1), draw_ids(6, 2)
    both = brain.sequence_log_prob(model, brain.pack([x], [[y, y + [0], y + [0, 0]]]))[0]
    for k in (1, 2):  # the second is an end-of-text inside a response
        row = torch.tensor([x + y + [0] * (k - 1)])
        end = model(row).logits[0, -1].log_softmax(-1)[0]
        assert end < -1
        torch.testing.assert_close(both[k] - both[k - 1], end, rtol=0, atol=1e-4)


@torch.no_grad()
def test_temperature_is_in_the_score():
    """Catches a score at temperature 1 of what was sampled at another, and a division of the
    log-probabilities in place of the logits."""
    model, (prompts, responses) = shared_model("gpt_neox"), make_ids(4)
    batch = brain.pack(prompts, responses)
    plain = table_of(plain_score, model, prompts, responses, 0.7).float()
    torch.testing.assert_close(brain.sequence_log_prob(model, batch, 0.7), plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(brain.sequence_log_prob(model, batch, temperature=0.7), plain,
                               rtol=0, atol=1e-4)
    wrong = brain.sequence_log_prob(model, batch)
    assert (wrong - plain).abs().min() > 0.05 and (wrong / 0.7 - plain).abs().min() > 0.05


def test_pack_refuses_what_it_cannot_lay_out():
    """Catches an empty prompt, whose first token nothing predicts, or a ragged n going through."""
    for prompts, responses in [([[]], [[[1, 0]]]), ([[1], [2]], [[[1, 0]], [[1, 0], [2, 0]]])]:
        with pytest.raises(ValueError):
            brain.pack(prompts, responses)


@torch.no_grad()
def test_scores_are_fp32_under_bf16_autocast(tmp_path):
    """Catches a head or a log-softmax in bf16, in the score and in the sampler. The layers add
    nothing here, so the logits depend on the last token alone and autocast has only the head to
    round; brain.load is what prepares a head."""
    model = build_model("gpt_neox")
    for layer in model.gpt_neox.layers:
        for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            linear.weight.zero_(), linear.bias.zero_()
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    run = SimpleNamespace(cfg=brain.Config(max_comparison_tokens=1), device=torch.device("cpu"))
    loaded, _ = brain.load(run, transformers.AutoModelForCausalLM, str(tmp_path))
    prompts, responses = make_ids(4)
    responses = [[draw_ids(30, i) + y for i, y in enumerate(ys)] for ys in responses]
    exact, batch = table_of(plain_score, model, prompts, responses), brain.pack(prompts, responses)
    with torch.autocast("cpu", torch.bfloat16):
        score, careless = (brain.sequence_log_prob(m, batch) for m in (loaded, model))
        sampled, log_q = brain.sample(loaded, prompts, 4, 30, eos_id=0,
                                      generator=torch.Generator().manual_seed(0))
    assert score.dtype == log_q.dtype == torch.float32
    torch.testing.assert_close(score, exact.float(), rtol=0, atol=2e-4)
    assert (careless - exact).abs().max() > 0.02  # what the preparation is for
    torch.testing.assert_close(log_q, table_of(plain_score, model, prompts, sampled).float(),
                               rtol=0, atol=2e-4)


def own_head_reward(model, prompt: list[int], response: list[int]):
    """The library's own head on one row; without a pad id it reads the row's last token."""
    assert model.config.pad_token_id is None
    return model(torch.tensor([prompt + response])).logits[0, 0]


@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_reward_is_read_at_the_last_token(family, n):
    """Catches a reward read one token early (before end-of-text) or at the padding, a branch that
    sees another, a reward model that needs a pad id, and a reward without a gradient."""
    model, (prompts, responses) = shared_model(family, reward=True), make_ids(n)
    packed = brain.score_reward(model, brain.pack(prompts, responses))
    plain = table_of(own_head_reward, model, prompts, responses)
    early = table_of(own_head_reward, model, prompts, [[y[:-1] for y in ys] for ys in responses])
    assert packed.shape == (3, n) and (packed - early).abs().max() > 0.1
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-4)
    assert_same_gradients(model, packed, plain)


# ------------------------------------------------------------------------------------------------
# The sampler against the exact softmax. Counts are tested cell by cell with exact binomial tails.
# ------------------------------------------------------------------------------------------------
FALSE_ALARM = 1e-7  # of a test, shared out among its cells


def assert_counts(counts: dict, probabilities: dict, trials: int) -> None:
    """Each count is binomial(trials, p): both tails, exact, at FALSE_ALARM over all cells."""
    assert set(counts) <= set(probabilities) and sum(counts.values()) == trials
    k = torch.arange(trials + 1, dtype=torch.float64)
    choose = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    for cell, p in probabilities.items():
        density = (choose + k * math.log(p) + (trials - k) * math.log1p(-p)).exp()
        seen = counts.get(cell, 0)
        tail = min(density[: seen + 1].sum(), density[seen:].sum()).item()
        assert tail > FALSE_ALARM / 2 / len(probabilities), (cell, seen, trials * p, tail)


def count(items) -> dict:
    """How often each item occurs."""
    counts = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def response_space(vocabulary: int, limit: int) -> list[tuple[int, ...]]:
    """Every response a sampler can emit: ids up to end-of-text (0), or `limit` ids without it."""
    ids = range(1, vocabulary)
    ended = [(*y, 0) for k in range(limit) for y in itertools.product(ids, repeat=k)]
    return ended + list(itertools.product(ids, repeat=limit))


@pytest.fixture(scope="module")
def five_tokens():
    """A model of five ids, two prompts of unequal length, and 4,096 responses to each of up to
    three ids at temperature 0.8, from one generator."""
    model, prompts = build_model("gpt_neox", vocab_size=5, seed=3), [[1, 2, 3, 4], [2]]
    responses, log_q = brain.sample(model, prompts * 128, 32, 3, eos_id=0, temperature=0.8,
                                    generator=torch.Generator().manual_seed(0))
    return model, prompts, responses, log_q


@torch.no_grad()
def exact_probabilities(model, prompt, limit: int, temperature: float) -> dict:
    """p of each response of `response_space`, by plain rows; they sum to 1."""
    found = {y: plain_score(model, prompt, list(y), temperature).exp().item()
             for y in response_space(model.config.vocab_size, limit)}
    assert abs(sum(found.values()) - 1) < 1e-5
    return found


def test_sampler_draws_from_the_exact_distribution(five_tokens):
    """Catches a wrong temperature, truncation, a cache that mixes branches or prompts up, and
    steps that are not independent: all 85 responses of up to three ids, false alarm 2e-7."""
    model, prompts, responses, _ = five_tokens
    for b, prompt in enumerate(prompts):
        drawn = [tuple(y) for ys in responses[b::2] for y in ys]
        assert_counts(count(drawn), exact_probabilities(model, prompt, 3, 0.8), 4096)


def test_branches_and_prompts_are_drawn_independently(five_tokens):
    """Catches uniforms that branches or prompts share: the first ids of two branches of one prompt,
    and of one branch of two prompts, are jointly distributed as the product, false alarm 2e-7."""
    model, prompts, responses, _ = five_tokens
    one = [exact_probabilities(model, prompt, 1, 0.8) for prompt in prompts]
    product = {(*a, *b): one[0][a] * one[0][b] for a in one[0] for b in one[0]}
    of_branches = [(ys[i][0], ys[i + 1][0]) for ys in responses[::2] for i in range(0, 32, 2)]
    assert_counts(count(of_branches), product, 2048)
    product = {(*a, *b): one[0][a] * one[1][b] for a in one[0] for b in one[1]}
    of_prompts = [(responses[b][i][0], responses[b + 1][i][0]) for b in range(0, 256, 2)
                  for i in range(32)]
    assert_counts(count(of_prompts), product, 4096)


def test_sampled_responses_end_once(five_tokens):
    """Catches ids after end-of-text, a lost end-of-text, one added to a response that was cut, and
    a wrong limit."""
    *_, responses, _ = five_tokens
    drawn = [y for ys in responses for y in ys]
    assert {len(y) for y in drawn} == {1, 2, 3}
    assert all(0 not in y[:-1] for y in drawn)
    assert all(y[-1] == 0 for y in drawn if len(y) < 3)
    assert {y[-1] == 0 for y in drawn if len(y) == 3} == {True, False}


def test_log_proposal_of_the_sampler_is_the_score(five_tokens):
    """Catches a sampler that returns the log-probability at another temperature, without
    end-of-text, or of ids after it."""
    model, prompts, responses, log_q = five_tokens
    with torch.no_grad():
        score = brain.sequence_log_prob(model, brain.pack(prompts * 128, responses), 0.8)
    assert log_q.dtype == torch.float32 and log_q.shape == (256, 32)
    torch.testing.assert_close(log_q, score, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sampler_and_score_agree_in_each_family(family):
    """Catches a sampling step whose positions or mask differ from the score's in one family, with
    prompts of unequal length and one of a single id."""
    model, (prompts, _) = shared_model(family), make_ids(1)
    responses, log_q = brain.sample(model, prompts, 3, 12, eos_id=0, temperature=0.7,
                                    generator=torch.Generator().manual_seed(0))
    plain = table_of(plain_score, model, prompts, responses, 0.7).float()
    torch.testing.assert_close(log_q, plain, rtol=0, atol=1e-4)


@torch.no_grad()
def test_sampler_reaches_beyond_the_first_fifty():
    """Catches top-k 50, and top-p: ids of rank over 50 of 416, and those in the last tenth of the
    probability, come as often as the softmax says, false alarm 2e-7."""
    model, prompt = shared_model("gpt_neox"), draw_ids(4, 4)
    p, ids = (model(torch.tensor([prompt])).logits[0, -1].double() / 3).softmax(-1).sort(
        descending=True)
    rank = {token: place for place, token in enumerate(ids.tolist())}
    responses, _ = brain.sample(model, [prompt] * 64, 32, 1, eos_id=0, temperature=3.0,
                                generator=torch.Generator().manual_seed(0))
    ranks = [rank[y[0]] for ys in responses for y in ys]
    for first in (50, int((p.cumsum(0) < 0.9).sum())):
        share = p[first:].sum().item()
        assert 0.05 < share < 0.95
        assert_counts(count(r >= first for r in ranks), {True: share, False: 1 - share}, 2048)


@torch.no_grad()
def test_generator_decides_the_samples():
    """Catches a generator that is ignored (the global one differs between the calls), or reset."""
    model, (prompts, _) = shared_model("gpt_neox"), make_ids(1)
    drawn, generator = [], torch.Generator().manual_seed(5)
    for number, given in enumerate([torch.Generator().manual_seed(5), generator, generator,
                                    torch.Generator().manual_seed(6)]):
        torch.manual_seed(number)
        drawn.append(brain.sample(model, prompts, 4, 6, eos_id=0, generator=given))
    assert drawn[0][0] == drawn[1][0] and torch.equal(drawn[0][1], drawn[1][1])
    assert drawn[2][0] != drawn[1][0] and drawn[3][0] != drawn[1][0]


@torch.no_grad()
def test_a_generator_per_prompt_makes_it_independent_of_the_batch():
    """Catches samples that depend on the other prompts of a micro-batch or on their order."""
    model, (prompts, _) = shared_model("gpt_neox"), make_ids(1)

    def draws(order):
        generators = [torch.Generator().manual_seed(40 + i) for i in order]
        return brain.sample(model, [prompts[i] for i in order], 4, 8, eos_id=0,
                            generator=generators)

    whole, log_q = draws([0, 1, 2])
    assert len({str(ys) for ys in whole}) == 3
    for order in ([2, 0, 1], [1], [2, 1]):
        some, some_log_q = draws(order)
        assert some == [whole[i] for i in order]
        torch.testing.assert_close(some_log_q, log_q[order], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Data: rows of each task against rules written out by hand
# ------------------------------------------------------------------------------------------------


def write_gz(path: Path, rows: list) -> Path:
    """Rows as a .jsonl.gz file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def say(count: int, seed) -> str:
    """A sentence of `count` words, each with its leading space."""
    chosen = random.Random(repr(seed)).choices(WORDS, k=count)
    return "".join(f" {word}" for word in chosen)


def config_of(*argv) -> brain.Config:
    """A configuration as the command line gives it."""
    return brain.parse_config([str(word) for word in argv])


def make_post(i: int, lines: list[str], **changes) -> dict:
    """A row of tldr_3_filtered; `summary` has no leading space there."""
    return {"id": f"t3_{i}", "subreddit": "AskDogs", "title": f"My dog, part {i}",
            "post": "\n".join(lines), "summary": say(6, f"summary {i}").strip(), **changes}


def make_comparison(i: int, split: str, **changes) -> dict:
    """A row of the comparisons; its texts have a leading space, `extra` may be missing."""
    info = {"id": f"t3_c{i}", "subreddit": "AskDogs", "title": "it", "post": say(20, f"post {i}")}
    texts = [say(5, f"{split} {i} {k}") for k in range(2)]
    row = {"info": info, "split": split, "choice": i % 2, "worker": "w", "batch": "b",
           "summaries": [{"text": text, "policy": "p", "note": "n"} for text in texts]}
    return {**row, **({"extra": {"confidence": 4}} if i % 3 else {}), **changes}


POSTS = {
    "train": [
        make_post(0, [say(30, 0).strip(), say(9, 1)]),
        make_post(1, [say(60, f"line {k}") for k in range(20)]),  # too long, with newlines
        make_post(2, [say(800, 2)]),  # too long, without
        make_post(3, ["", say(40, 3), "", "", say(900, 3), ""]),  # the last cuts leave nothing
        make_post(4, ["Größe: 3 € – ‘naïve’ 犬と猫 🐕", say(12, 4)], title="Ünï “日本”"),
        *(make_post(i, [say(15 + i, i)]) for i in range(5, 24))],
    "test": [make_post(100 + i, [say(30, f"held out {i}")]) for i in range(7)]
            + [make_post(107, [say(70, f"long {k}") for k in range(15)])],
}
BATCHES = [*range(3, 21), 22]


def news(row: dict) -> dict:
    """The row as one about a CNN/DM article, which has no post."""
    return {**row, "info": {"id": "x", "article": say(30, "news"), "site": "cnn"}}


@pytest.fixture(scope="module")
def tldr_dir(tmp_path_factory):
    """OpenAI's layout: posts, and comparisons in batches of which there is no 21."""
    folder = tmp_path_factory.mktemp("tldr")
    for split, rows in POSTS.items():
        write_lines(folder / f"datasets/tldr_3_filtered/{split}.jsonl", rows)
    for i in BATCHES:
        rows = [make_comparison(10 * i + k, ["train", "train", "valid1", "valid2"][k])
                for k in range(4)]
        del rows[1]["info"]["id"]
        write_lines(folder / f"dataset/comparisons/batch{i}.json", rows + [news(rows[0])] * (i < 8))
    return folder


def openai_query(tokenizer, info: dict, limit: int) -> str:
    """The published rule: cut the post at its last newline, else by a character, until it fits."""
    post = info["post"]
    while True:
        query = (f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {post}"
                 "\n\nTL;DR:")
        if len(tokenizer(query).input_ids) <= limit:
            return query
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]


def expected_tldr(tokenizer, split: str, limit: int, comparisons: bool) -> list[tuple]:
    """What load_task must return for the files of `tldr_dir`, in their order."""
    rows = [(openai_query(tokenizer, row, limit), " " + row["summary"], None, None)
            for row in POSTS[split]]
    for i in BATCHES if comparisons else []:
        for k in (0, 1) if split == "train" else (2, 3):
            row = make_comparison(10 * i + k, ["train", "train", "valid1", "valid2"][k])
            texts = [summary["text"] for summary in row["summaries"]]
            rows.append((openai_query(tokenizer, row["info"], limit), None,
                         texts[row["choice"]], texts[1 - row["choice"]]))
    return rows


@pytest.mark.parametrize("split", ["train", "test"])
def test_tldr_rows_follow_the_published_rules(tldr_dir, split, capsys):
    """Catches a wrong cut of long posts, a wrong template or trailing space, a doubled or missing
    leading space, chosen and rejected swapped, splits mixed up, a batch left out, and CNN/DM rows
    let in or not counted."""
    tokenizer = build_tokenizer()
    cfg = config_of("--task", "tldr", "--base", "unused", "--data_dir", tldr_dir)
    examples = brain.load_task(cfg, split, tokenizer)
    expected = expected_tldr(tokenizer, split, 512, comparisons=True)
    assert [tuple(e) for e in examples] == expected
    news_rows = 5 if split == "train" else 0
    printed = re.findall(r"\d+", capsys.readouterr().out)
    assert {str(len(expected)), str(news_rows)} <= set(printed)
    lengths = [len(tokenizer(e.prompt).input_ids) for e in examples]
    assert max(lengths) <= 512
    assert max(lengths) > 400  # something was cut, and not to nothing
    if split == "train":
        assert lengths[2] == 512 and "犬と猫 🐕" in examples[4].prompt


def test_tldr_reads_comparisons_only_to_train_a_reward_model(tldr_dir, tmp_path):
    """Catches comparisons that are read, or fetched, although --reward was given."""
    cfg = config_of("--task", "tldr", "--prior", "p", "--reward", "r", "--data_dir", tmp_path)
    write_lines(tmp_path / "datasets/tldr_3_filtered/train.jsonl", POSTS["train"][3:])
    examples = brain.load_task(cfg, "train", build_tokenizer())
    assert [e.reference for e in examples] == [" " + row["summary"] for row in POSTS["train"][3:]]


TURN = "\n\nAssistant:"


def make_dialogue(i: int, **changes) -> dict:
    """A row of HH: two whole dialogues of one or two turns; the better answer is friendly."""
    prompt = "".join(f"\n\nHuman:{say(6 + i % 4, (i, turn))}\n\nAssistant:"
                     + say(3, turn) * (turn > 0) for turn in range(i % 2, -1, -1))
    return {"chosen": prompt + say(2 + i % 3, i) + " good day .",
            "rejected": prompt + say(2 + i % 2, -i) + " bad no !", **changes}


def split_dialogue(row: dict) -> tuple:
    """(prompt, reference, chosen, rejected) of a row that is whole."""
    at = row["chosen"].rindex(TURN) + len(TURN)
    return row["chosen"][:at], row["chosen"][at:], row["chosen"][at:], row["rejected"][at:]


@pytest.fixture(scope="module")
def hh_dir(tmp_path_factory):
    """Anthropic's layout with two subsets: 60 + 20 training rows and 12 + 12 test rows."""
    folder = tmp_path_factory.mktemp("hh")
    for subset, first, train in [("harmless-base", 0, 60), ("helpful-base", 500, 20)]:
        write_gz(folder / subset / "train.jsonl.gz",
                 [make_dialogue(first + i) for i in range(train)])
        write_gz(folder / subset / "test.jsonl.gz",
                 [make_dialogue(first + 200 + i) for i in range(12)])
    return folder


def test_hh_rows_are_split_at_the_last_turn(tmp_path, capsys):
    """Catches a prompt cut at the first turn, a lost leading space, broken rows that are let in or
    stop the run, long prompts that are cut, and skipped rows that are not counted."""
    whole = [make_dialogue(i) for i in range(6)]
    other = {**make_dialogue(7), "rejected": make_dialogue(8)["rejected"]}  # differing prompts
    empty = {**make_dialogue(9), "rejected": split_dialogue(make_dialogue(9))[0]}
    blank = {**make_dialogue(9), "chosen": split_dialogue(make_dialogue(9))[0] + " \n"}
    long = make_dialogue(10)
    long = {side: "\n\nHuman:" + say(300, 1) + "\n\nAssistant: yes" + long[side] for side in long}
    write_gz(tmp_path / "harmless-base/train.jsonl.gz",
             [other, *whole[:3], empty, blank, long, *whole[3:], other])
    cfg = config_of("--task", "hh", "--prior", "p", "--hh_subsets", "harmless-base",
                    "--data_dir", tmp_path, "--max_prompt_tokens", "100")
    examples = brain.load_task(cfg, "train", build_tokenizer())
    assert [tuple(e) for e in examples] == [split_dialogue(row) for row in whole]
    assert {"6", "4", "1"} <= set(re.findall(r"\d+", capsys.readouterr().out))


def test_bos_stands_once_before_prompts_and_never_in_responses():
    """Catches BOS added twice, or to responses, a missing or doubled end-of-text, and an
    end-of-text on a response that was cut. Relies on brain.encode."""
    llama, neox = build_tokenizer(bos=True), build_tokenizer()
    for tokenizer, start in [(llama, [1]), (neox, [])]:
        plain = tokenizer(" the cat can run .", add_special_tokens=False).input_ids
        assert 0 not in plain and 1 not in plain
        assert brain.encode(tokenizer, [" the cat can run ."]) == [start + plain]
        assert brain.encode(tokenizer, [" the cat can run ."], len(plain) + 1) == [plain + [0]]
        assert brain.encode(tokenizer, [" the cat can run ."], len(plain)) == [plain]
        assert brain.encode(tokenizer, [" the cat can run ."], 2) == [plain[:2]]


# ------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine
# ------------------------------------------------------------------------------------------------


class Files(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of the server's `files`, with Content-Length and Range, and a record of both."""

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(None)

    def answer(self, body):
        first = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.server.requests.append((self.command, self.path, first))
        whole = self.server.files[self.path]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(whole) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        self.wfile.write(whole[first:] if body is None else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def file_server():
    """The server; its address is in `url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.requests = {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("task", ["hh", "tldr"])
def test_absent_files_are_fetched_and_resumed(task, file_server, tmp_path, monkeypatch, capsys):
    """Catches a download that starts anew, that appends a whole file to a part, that keeps the
    temporary name, that is not announced with its size, or that is made again."""
    if task == "hh":
        name, rows = "harmless-base/train.jsonl.gz", [make_dialogue(i) for i in range(40)]
        whole = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    else:
        name, rows = "datasets/tldr_3_filtered/train.jsonl", POSTS["train"][3:]
        whole = "\n".join(map(json.dumps, rows)).encode()
    file_server.files["/" + name] = whole
    monkeypatch.setattr(brain, {"hh": "HH_URL", "tldr": "TLDR_URL"}[task], file_server.url)
    part = tmp_path / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:1000])  # an earlier run was stopped here
    cfg = config_of("--task", task, "--prior", "p", "--reward", "r", "--data_dir", tmp_path,
                    *(["--hh_subsets", "harmless-base"] if task == "hh" else []))
    examples = brain.load_task(cfg, "train", build_tokenizer())
    printed = capsys.readouterr().out
    assert len(examples) == len(rows) and (tmp_path / name).read_bytes() == whole
    assert not part.exists()
    assert [r for r in file_server.requests if r[0] == "GET"] == [("GET", "/" + name, 1000)]
    assert f"{file_server.url}/{name}" in printed and re.search(r"\d [kM]?B\b", printed)
    before = len(file_server.requests)
    assert brain.load_task(cfg, "train", build_tokenizer()) == examples
    assert len(file_server.requests) == before


# ------------------------------------------------------------------------------------------------
# Whole runs, in this process
# ------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """What a run left behind."""

    status: int
    stdout: str
    stderr: str
    folder: Path

    def result(self) -> dict:
        """The last line of stdout."""
        assert self.status == 0, self.stderr
        return json.loads(self.stdout.splitlines()[-1])

    def metrics(self, stage: str | None = None) -> list[dict]:
        """The lines of metrics.jsonl, all or those of a stage, without what may differ."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        free = ("seconds_", "tokens_", "peak_")
        return [{key: value for key, value in line.items() if not key.startswith(free)}
                for line in lines if stage in (None, line["stage"])]


SHORT = dict(device="cpu", steps=4, samples_per_prompt=4, prompts_per_step=4,
             prompts_per_refresh=8, max_prompt_tokens=64, max_response_tokens=12,
             max_comparison_tokens=16, eval_prompts=8, eval_samples=2, lr=1e-3)


def launch(out: Path, **flags) -> Finished:
    """brain.main with these flags over those of SHORT."""
    argv = []
    for name, value in {**SHORT, **flags, "out": out}.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = brain.main(argv)
    return Finished(status, stdout.getvalue(), stderr.getvalue(), out)


@contextlib.contextmanager
def recorded(name: str):
    """While it lasts, calls of brain's public function `name` are kept: (arguments, result)."""
    function, calls = getattr(brain, name), []

    @functools.wraps(function)
    def spy(*args, **options):
        result = function(*args, **options)
        calls.append((args, result))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, name, spy)
        yield calls


RESULT_KEYS = set(
    "task steps seconds reward_prior reward_policy reward_reference win_rate_vs_prior "
    "win_rate_vs_reference win_rate_vs_prior_ci win_rate_vs_reference_ci kl_to_prior "
    "kl_to_prior_se eos_share response_tokens".split())


def assert_complete(run: Finished, task: str, temperature: float = 1.0) -> None:
    """The run ended well, and its policy loads as any other model, samples what was trained, and
    generates."""
    result = run.result()
    assert result.keys() >= RESULT_KEYS and result["task"] == task and result["steps"] == 4
    low, high = result["win_rate_vs_prior_ci"]
    assert 0 <= low <= result["win_rate_vs_prior"] <= high <= 1
    lines = run.metrics("brain")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder / "policy")
    saved = json.loads((run.folder / "policy/generation_config.json").read_text())
    assert (saved["do_sample"], saved["top_k"], saved["top_p"]) == (True, 0, 1.0)
    assert saved["temperature"] == temperature
    ids = tokenizer(" the cat", return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=5, pad_token_id=0)
    assert generated.shape[1] > ids.input_ids.shape[1]
    assert (run.folder / "report.md").stat().st_size > 500


def assert_frozen_between_refreshes(lines: list[dict]) -> None:
    """Two steps per refresh: the log-ratios are exactly 0 in the first, and not in the second."""
    for turn, line in enumerate(lines):
        extremes = line["log_ratio_min"], line["log_ratio_max"]
        assert (extremes == (0, 0)) == (turn % 2 == 0), (turn, extremes)


# A world small enough to know everything of it: 5 ids, at most 3 in a response, 85 responses.
WORLD = dict(task="jsonl", max_prompt_tokens=8, max_response_tokens=3, max_comparison_tokens=3,
             samples_per_prompt=32, prompts_per_step=8, prompts_per_refresh=16, steps=40, lr=1.5e-3,
             kl_coef=0.2, temperature=0.8, eval_prompts=16, eval_samples=256)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory):
    """Prior, reward model and 16 rows of the world, prompts of 1 to 4 words, for both splits."""
    folder = tmp_path_factory.mktemp("world")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate([EOS, *"abcd"])}, unk_token=EOS))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS)
    for name, reward in [("prior", False), ("reward", True)]:
        build_model(reward=reward, seed=3 + reward, vocab_size=5).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [" ".join(letters) for k, every in [(1, 1), (2, 3), (3, 6), (4, 6)]
               for letters in itertools.islice(itertools.permutations("abcd", k), 0, None, every)]
    rows = [{"prompt": prompt, "reference": " " + prompt[:3]} for prompt in prompts]
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


def world_run(world_dir: Path, out: Path, **flags) -> Finished:
    """A run in the world."""
    return launch(out, **{**WORLD, "prior": world_dir / "prior", "reward": world_dir / "reward",
                          "data_dir": world_dir, **flags})


@pytest.fixture(scope="module")
def world(world_dir, tmp_path_factory):
    """A run in the world, and the arguments of brain_loss at each of its steps."""
    with recorded("brain_loss") as calls:
        run = world_run(world_dir, tmp_path_factory.mktemp("run") / "world")
    return run, [args for args, _ in calls]


class Known(NamedTuple):
    """All 85 responses to the 16 test prompts, each (16, 85), by plain rows."""

    log_prior: torch.Tensor
    log_policy: torch.Tensor
    reward: torch.Tensor
    ended: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor  # (16,) its reward


@pytest.fixture(scope="module")
def known(world, world_dir):
    """Exact figures of the finished run's models, read from its folder."""
    run, _ = world
    run.result()
    kind = transformers.AutoModelForCausalLM.from_pretrained
    prior, policy = kind(world_dir / "prior").eval(), kind(run.folder / "policy").eval()
    reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(
        world_dir / "reward").eval()
    space, table = response_space(5, 3), []
    penalty = json.loads((run.folder / "config.json").read_text())["missing_eos_penalty"]
    assert penalty > 0
    with torch.no_grad():
        for line in (world_dir / "test.jsonl").read_text().splitlines():
            row = json.loads(line)
            x, y = ([" abcd".index(w) for w in row[k].split()] for k in ("prompt", "reference"))
            columns = []
            for size in (1, 2, 3):  # rows of one length need no padding
                some = [list(r) for r in space if len(r) == size]
                ids = torch.tensor([x + r for r in some])
                places = torch.tensor(some)
                scores = [(model(ids).logits[:, len(x) - 1 : -1].double() / 0.8).log_softmax(-1)
                          .gather(-1, places[..., None]).sum((1, 2)) for model in (prior, policy)]
                ended = places[:, -1] == 0
                raw = torch.stack([own_head_reward(reward_model, x, r) for r in some]).double()
                columns.append(torch.stack([*scores, raw - penalty * (~ended), ended.double(),
                                            torch.full_like(raw, size)]))
            reference = own_head_reward(reward_model, x, y + [0]).double()
            table.append((torch.cat(columns, -1), reference))
    return Known(*torch.stack([t for t, _ in table], 1), torch.stack([r for _, r in table]))


def assert_mean(mean: float, log_p, values, samples: int) -> None:
    """`mean` of `samples` draws for each prompt is the expectation of `values` under p: both
    (prompts, |Y|). By Bernstein's inequality a false alarm has a probability of at most 1e-7."""
    p, draws = log_p.exp(), samples * len(values)
    centre = (p * values).sum(-1)
    variance = (p * (values - centre[:, None]).square()).sum(-1).mean().item()
    reach, log_odds = (values.amax(-1) - values.amin(-1)).max().item(), math.log(2e7)
    linear = reach * log_odds / (3 * draws)
    allowed = linear + math.sqrt(linear**2 + 2 * variance * log_odds / draws)
    assert abs(mean - centre.mean().item()) < allowed, (mean, centre.mean().item(), allowed)


def test_world_is_known(known):
    """Catches a mistake in the oracle below: all responses of each prompt add up to 1."""
    for log_p in (known.log_prior, known.log_policy):
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(16, dtype=torch.float64),
                                   rtol=0, atol=1e-4)


def test_policy_has_moved_to_the_posterior(world, known):
    """Catches a loss, a gradient or an update of the wrong sign, weights without the prior or
    without the proposal, and kl_coef in the wrong place: the exact KL(posterior || policy) falls
    to a third (measured: a fifth), and what the run printed is that KL."""
    log_posterior = (known.log_prior + known.reward / 0.2).log_softmax(-1)
    start, end = ((log_posterior.exp() * (log_posterior - log_q)).sum(-1).mean().item()
                  for log_q in (known.log_prior, known.log_policy))
    assert start > 0.5 and end < start / 3
    result = world[0].result()
    if "kl_to_posterior_end" in result:  # enumerated where it is possible, not on toy alone
        assert abs(result["kl_to_posterior_start"] - start) < 1e-3
        assert abs(result["kl_to_posterior_end"] - end) < 1e-3


def test_evaluation_estimates_the_exact_figures(world, known):
    """Catches a KL of the wrong sign or over old samples, a penalty that is not everywhere, a
    temperature that is not, figures of prior and policy swapped, and lengths without end-of-text;
    false alarm 6e-7."""
    result, ratio = world[0].result(), known.log_policy - known.log_prior
    assert_mean(result["reward_prior"], known.log_prior, known.reward, 256)
    assert_mean(result["reward_policy"], known.log_policy, known.reward, 256)
    assert_mean(result["kl_to_prior"], known.log_policy, ratio, 256)
    assert_mean(result["eos_share"], known.log_policy, known.ended, 256)
    assert_mean(result["response_tokens"], known.log_policy, known.tokens, 256)
    assert abs(result["reward_reference"] - known.reference.mean().item()) < 1e-3
    assert result["kl_to_prior"] > 0.2  # far enough for its sign to show
    assert result["reward_policy"] > result["reward_prior"] + 0.1


def test_win_rates_are_those_of_all_pairs(world, known):
    """Catches ties that count as wins or as losses, sides swapped, and references scored without
    end-of-text. Hoeffding's inequality over 16 × 256 disjoint pairs: false alarm 2e-7."""
    result, allowed = world[0].result(), math.sqrt(math.log(2e7) / (2 * 16 * 256))
    p, q, r = known.log_prior.exp(), known.log_policy.exp(), known.reward
    gap = r[:, :, None] - r[:, None]  # (16, 85, 85): policy's against prior's
    tie = gap.abs() < 1e-4
    pair = q[:, :, None] * p[:, None]
    ties = (pair * tie).sum((1, 2)).mean().item()
    exact = (pair * ((gap > 0) & ~tie)).sum((1, 2)).mean().item() + ties / 2
    assert ties / 2 > allowed  # so that counting them wrongly shows
    assert abs(result["win_rate_vs_prior"] - exact) < allowed
    gap = r - known.reference[:, None]
    tie = gap.abs() < 1e-4
    exact = (q * ((gap > 0) & ~tie)).sum(-1).mean() + (q * tie).sum(-1).mean() / 2
    assert abs(result["win_rate_vs_reference"] - exact.item()) < allowed


def test_the_posteriors_own_row(world, known):
    """Catches a posterior that loses to the prior, or is of another penalty or kl_coef: its row in
    the report, an expectation, against all pairs of responses written out."""
    p, r = known.log_prior.exp(), known.reward
    q = (known.log_prior + r / 0.2).softmax(-1)  # (16, 85)
    gap = r[:, :, None] - r[:, None]  # (16, 85, 85): the posterior's against the prior's
    wins = (gap > 1e-4).double() + (gap.abs() <= 1e-4).double() / 2
    exact = (q[:, :, None] * p[:, None] * wins).sum((1, 2)).mean().item()
    report = (world[0].folder / "report.md").read_text().splitlines()
    row = next(line for line in report if line.startswith("| posterior")).split("|")
    assert exact > 0.55 and float(row[3].split()[0]) == pytest.approx(exact, abs=2e-3)
    assert float(row[2]) == pytest.approx((q * r).sum(-1).mean().item(), abs=2e-3)
    assert float(row[6]) == pytest.approx((q * known.ended).sum(-1).mean().item(), abs=2e-3)


def test_proposal_is_frozen_between_refreshes(world):
    """Catches a proposal that follows the policy at each step, one that is never refreshed, and
    samples whose scores belong to others. Relies on brain_loss being called once a step."""
    run, calls = world
    assert_frozen_between_refreshes(run.metrics("brain"))
    assert len(calls) == 40
    for step, (log_policy, log_prior, log_proposal, reward, *_) in enumerate(calls):
        assert log_policy.shape == reward.shape == (8, 32)
        assert torch.equal(log_policy, log_proposal) == (step % 2 == 0)
        assert torch.equal(log_proposal, log_prior) == (step < 2)


def test_metrics_are_those_of_the_tensors(world):
    """Catches a KL of the wrong sign, ESS of the wrong weights, extremes swapped and a loss that
    is not the mean over the step's prompts."""
    run, calls = world
    for line, args in zip(run.metrics("brain"), calls, strict=True):
        q, p, q1, r = (tensor.detach().double() for tensor in args[:4])
        alpha = (p + r / 0.2 - q1).exp()
        beta, alpha = (q - q1).exp(), alpha / alpha.sum(-1, keepdim=True)
        beta = beta / beta.sum(-1, keepdim=True)
        expected = {
            "loss": (alpha * (alpha / beta).log()).sum(-1), "reward": r,
            "ess_alpha": 1 / alpha.square().sum(-1), "ess_beta": 1 / beta.square().sum(-1),
            "kl_to_prior": (beta * (q - p)).sum(-1)}
        for name, values in expected.items():
            assert abs(line[name] - values.mean().item()) < 1e-4, (line["step"], name)
        assert line["log_ratio_min"] == pytest.approx((q - q1).min().item(), abs=1e-6)
        assert line["log_ratio_max"] == pytest.approx((q - q1).max().item(), abs=1e-6)
        if line["step"] % 2 == 0:  # a refresh: what its samples say, over both of its steps
            fresh = calls[line["step"] : line["step"] + 2]
            ratio = torch.cat([args[2] - args[1] for args in fresh])
            reward = torch.cat([args[3] for args in fresh])
            assert line["refresh_kl"] == pytest.approx(ratio.mean().item(), abs=1e-4)
            assert line["refresh_reward"] == pytest.approx(reward.mean().item(), abs=1e-4)
    assert line["kl_to_prior"] > 0.1


def test_micro_batches_change_nothing_but_rounding(world, world_dir, tmp_path):
    """Catches a loss, a gradient or a figure of the last micro-batch alone, a mean of their means,
    rewards of other prompts after sorting by length, and samples that depend on the split."""
    whole = world_run(world_dir, tmp_path / "whole", steps=3, eval_samples=4)
    with recorded("brain_loss") as calls:
        parts = world_run(world_dir, tmp_path / "parts", steps=3, eval_samples=4,
                          micro_batch_tokens=330)
    sizes = [len(args[0]) for args, _ in calls]
    assert sum(sizes) == 24 and len(set(sizes)) > 1  # unequal ones
    for one, other in zip(whole.metrics("brain"), parts.metrics("brain"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"stage"}:
            assert other[name] == pytest.approx(one[name], abs=1e-4, rel=1e-4), name
    assert whole.metrics("brain")[0]["gradient_norm"] == pytest.approx(
        world[0].metrics("brain")[0]["gradient_norm"], rel=1e-5)  # lr decays, step 0 is the same
    one, other = whole.result(), parts.result()
    for name in ("reward_prior", "reward_policy", "reward_reference", "kl_to_prior",
                 "win_rate_vs_reference"):
        assert other[name] == pytest.approx(one[name], abs=1e-3), name


def test_prior_as_proposal(world_dir, tmp_path):
    """Catches --proposal prior that samples from the policy after the first refresh, or that
    scores its samples by it: the prior's score is the proposal's, and the policy moves away."""
    with recorded("brain_loss") as calls:
        run = world_run(world_dir, tmp_path / "run", steps=4, eval_samples=2, proposal="prior")
    assert run.status == 0, run.stderr
    assert len(calls) == 4
    for step, ((log_policy, log_prior, log_proposal, *_), _) in enumerate(calls):
        assert torch.equal(log_proposal, log_prior)
        assert torch.equal(log_policy, log_proposal) == (step == 0)


# The three families, the four ways to a reward model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A prior and a reward model of each family, and a BERT with its own tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        save_checkpoint(folder / family / "prior", family, seed=1)
        save_checkpoint(folder / family / "reward", family, seed=2, reward=True)
    words = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *WORDS, *"cdefghjklmnopqrstuvwxyz:/",
             *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=1, initializer_range=0.3, pad_token_id=0,
    )).save_pretrained(folder / "bert")
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder / "bert")
    return folder


HH_BASE = dict(task="hh", sft_lr=3e-3, sft_batch=16, sft_epochs=4, reward_lr=1e-2,
               reward_batch=16, reward_epochs=4, hh_subsets=["harmless-base", "helpful-base"])


@pytest.fixture(scope="module")
def hh_base(hh_dir, checkpoints, tmp_path_factory):
    """sft, reward, brain and eval from a base model."""
    return launch(tmp_path_factory.mktemp("run") / "hh", **HH_BASE, data_dir=hh_dir,
                  base=checkpoints / "gpt_neox/prior")


def test_run_from_a_base_model(hh_base):
    """Catches a stage that does not run, does not learn or does not save, in GPT-NeoX."""
    assert_complete(hh_base, "hh")
    losses = [line["loss"] for line in hh_base.metrics("sft")]
    assert len(losses) == 20 and 0 < sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert_frozen_between_refreshes(hh_base.metrics("brain"))
    transformers.AutoModelForCausalLM.from_pretrained(hh_base.folder / "prior")


@torch.no_grad()
def test_trained_reward_model_prefers_the_chosen(hh_base, hh_dir):
    """Catches chosen and rejected swapped in the data, in the pairs or in the loss, and an accuracy
    that counts the rejected: of 24 held-out pairs at least 20 come out right, by plain rows."""
    folder = hh_base.folder / "reward"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, right = transformers.AutoTokenizer.from_pretrained(folder), 0
    for first in (200, 700):
        for i in range(12):
            prompt, _, *pair = split_dialogue(make_dialogue(first + i))
            scores = [own_head_reward(model, tokenizer(prompt).input_ids,
                                   (tokenizer(text).input_ids + [0])[:16]) for text in pair]
            right += int(scores[0] > scores[1])
    assert right >= 20
    accuracy = [line["accuracy"] for line in hh_base.metrics("reward")]
    assert sum(accuracy[-4:]) / 4 > 0.8


def test_same_command_same_numbers(hh_base, hh_dir, checkpoints, tmp_path):
    """Catches a draw that the seed does not reach, the order of the data included, and a metric
    that depends on the clock."""
    torch.manual_seed(123)  # the global generator decides nothing
    again = launch(tmp_path / "again", **HH_BASE, data_dir=hh_dir,
                   base=checkpoints / "gpt_neox/prior")
    assert again.metrics() == hh_base.metrics()
    one, two = again.result(), hh_base.result()
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    other = launch(tmp_path / "other", **{**HH_BASE, "sft_epochs": 1, "reward_epochs": 1}, seed=1,
                   steps=1, data_dir=hh_dir, base=checkpoints / "gpt_neox/prior")
    assert other.metrics("sft")[0]["loss"] != hh_base.metrics("sft")[0]["loss"]


def test_micro_batches_of_texts(hh_base, hh_dir, checkpoints, tmp_path):
    """Catches a supervised loss or gradient of the last micro-batch alone, or a mean of means."""
    parts = launch(tmp_path / "parts", **{**HH_BASE, "sft_epochs": 1, "reward_epochs": 1},
                   data_dir=hh_dir, base=checkpoints / "gpt_neox/prior", micro_batch_tokens=150)
    one, other = hh_base.metrics("sft")[0], parts.metrics("sft")[0]
    for name in ("loss", "gradient_norm"):
        assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_run_of_llama_from_checkpoints(hh_dir, checkpoints, tmp_path):
    """Catches BOS added twice, lost, or put into responses, in Llama, whose tokenizer adds it; and
    a report that shows answers beside another prompt. Texts must reach the models through pack."""
    with recorded("pack") as calls:
        run = launch(tmp_path / "run", task="hh", data_dir=hh_dir, hh_subsets=["helpful-base"],
                     prior=checkpoints / "llama/prior", reward=checkpoints / "llama/reward",
                     temperature=0.7, eval_prompts=12)
    assert_complete(run, "hh", temperature=0.7)
    assert_frozen_between_refreshes(run.metrics("brain"))
    assert not (run.folder / "prior").exists() and not (run.folder / "reward").exists()
    packed = [(x, y) for (xs, yss, *_), _ in calls for x, ys in zip(xs, yss, strict=True)
              for y in ys]
    plain = functools.partial(build_tokenizer(bos=True), add_special_tokens=False)
    rows, shown = [split_dialogue(make_dialogue(700 + i)) for i in range(12)], 0
    report = (run.folder / "report.md").read_text()
    for prompt, reference, *_ in rows:
        before, asked, after = report.partition(prompt.rpartition("Human:")[2][: -len(TURN)])
        if asked:  # a sample: of all the references below it, its own comes first
            shown += 1
            assert min(after.find(y) % 10**9 for _, y, *_ in rows) == after.find(reference) >= 0
        assert ([1] + plain(prompt).input_ids, plain(reference).input_ids + [0]) in packed
    assert shown >= 2


def test_run_of_gpt2_with_a_decoder_of_another_tokenizer(hh_dir, checkpoints, tmp_path):
    """Catches dropout left on (0.1 in GPT-2's config: log-ratios would not be 0), positions that
    left padding shifts, and ids of one vocabulary read in another: references are re-encoded with
    the reward model's own tokenizer, its BOS and its end-of-text."""
    rows = [dict(zip(brain.Example._fields, split_dialogue(make_dialogue(i)), strict=True))
            for i in range(32)]
    write_lines(tmp_path / "data/train.jsonl", rows[:24])
    write_lines(tmp_path / "data/test.jsonl", rows[24:])
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path / "data",
                 prior=checkpoints / "gpt2/prior", reward=checkpoints / "llama/reward")
    assert_complete(run, "jsonl")
    assert_frozen_between_refreshes(run.metrics("brain"))
    tokenizer = build_tokenizer(bos=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints / "llama/reward").eval()
    exact = sum(own_head_reward(model, tokenizer(row["prompt"]).input_ids,
                             tokenizer(row["reference"]).input_ids[1:] + [0])
                for row in rows[24:]) / 8
    assert run.result()["reward_reference"] == pytest.approx(exact.item(), abs=1e-3)


def test_run_on_prompts_alone(checkpoints, tmp_path):
    """Catches a task without references that stops the run, or that reports figures for them."""
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [{"prompt": say(5, i)} for i in range(9)])
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, steps=2,
                 prior=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward")
    result = run.result()
    assert {key for key in RESULT_KEYS if result[key] is None} == {
        "reward_reference", "win_rate_vs_reference", "win_rate_vs_reference_ci"}


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_run_in_bf16(family, hh_dir, checkpoints, tmp_path, monkeypatch):
    """Catches what only CUDA's arithmetic would show, with autocast and bf16 weights on the CPU:
    log-ratios that rounding moves off 0 after a refresh, tensors of two types in one operation, a
    guard that trips on rounding; and weights of the policy that are not fp32."""
    start = brain.Run.__init__

    def as_on_cuda(run, cfg):
        start(run, cfg)
        run.dtype = torch.bfloat16
        run.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    monkeypatch.setattr(brain.Run, "__init__", as_on_cuda)
    run = launch(tmp_path / "run", task="hh", data_dir=hh_dir, hh_subsets=["helpful-base"],
                 prior=checkpoints / f"{family}/prior", reward=checkpoints / f"{family}/reward")
    assert_complete(run, "hh")
    assert_frozen_between_refreshes(run.metrics("brain"))
    first = run.metrics("brain")[0]
    assert abs(first["refresh_kl"]) < 0.05 and 0 < first["refresh_kl_sd"] < 0.1  # rounding's
    for tensor in transformers.AutoModelForCausalLM.from_pretrained(
            run.folder / "policy").state_dict().values():
        assert tensor.dtype == torch.float32 and (tensor != tensor.bfloat16()).any()


class Terminal(io.StringIO):
    """A stdout that somebody looks at."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_bars_only_where_somebody_looks(stream, checkpoints, tmp_path, monkeypatch):
    """Catches bars in a log file, none on a terminal, and samples that a terminal would wrap."""
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [{"prompt": say(5, i)} for i in range(9)])
    monkeypatch.setattr(io, "StringIO", stream)
    monkeypatch.setenv("COLUMNS", "30")
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, steps=2, save_every=1,
                 prior=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward")
    assert run.result()
    if stream is Terminal:
        for what in ("reading train: 9it", "brain: 100%", "loss=", "sampling:   0%"):
            assert what in run.stderr, what
    else:
        assert not run.stderr
    printed, written = run.stdout.splitlines(), (run.folder / "report.md").read_text().splitlines()
    samples = written[written.index("## Samples, one of each model") + 1:]
    assert len(samples) == 16 and max(map(len, samples)) > 40  # a blank, a prompt and two answers
    assert printed[-17:-1] == [line[:30] for line in samples]


def test_run_on_tldr(tldr_dir, checkpoints, tmp_path):
    """Catches what differs in OpenAI's files and in the public checkpoints: no pad id, more ids
    than tokens, prompts of 512 tokens, a reference cut, or without its leading space or end."""
    run = launch(tmp_path / "run", task="tldr", data_dir=tldr_dir, max_prompt_tokens=512,
                 max_response_tokens=5, temperature=0.7, prior=checkpoints / "gpt_neox/prior",
                 reward=checkpoints / "gpt_neox/reward")
    assert_complete(run, "tldr", temperature=0.7)
    tokenizer = build_tokenizer()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints / "gpt_neox/reward").eval()
    exact = sum(own_head_reward(model, tokenizer(prompt).input_ids,
                             tokenizer(reference).input_ids + [0])
                for prompt, reference, *_ in expected_tldr(tokenizer, "test", 512, False)) / 8
    assert run.result()["reward_reference"] == pytest.approx(exact.item(), abs=1e-3)


def test_run_on_tldr_with_a_bert(tldr_dir, checkpoints, tmp_path):
    """Catches a reward model of another kind that reads ids of the policy's tokenizer, or special
    tokens as text: each reference is scored as a pair of texts with the model's own tokenizer."""
    run = launch(tmp_path / "run", task="tldr", data_dir=tldr_dir, max_prompt_tokens=256, steps=2,
                 prior=checkpoints / "llama/prior", reward=checkpoints / "bert")
    result = run.result()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints / "bert").eval()
    exact = [model(**tokenizer(prompt, reference, return_tensors="pt")).logits.item()
             for prompt, reference, *_ in
             expected_tldr(build_tokenizer(bos=True), "test", 256, comparisons=False)]
    assert max(exact) - min(exact) > 0.05
    assert result["reward_reference"] == pytest.approx(sum(exact) / 8, abs=1e-3)


def test_run_on_tldr_from_a_base_model(tldr_dir, checkpoints, tmp_path):
    """Catches comparisons that do not reach the reward model, and that become prompts of the
    policy's training: rows without a reference train the reward model alone."""
    base = save_checkpoint(tmp_path / "base", seed=4)
    with recorded("sample") as calls:
        run = launch(tmp_path / "run", task="tldr", data_dir=tldr_dir, max_prompt_tokens=256,
                     base=base, sft_batch=8, reward_batch=16, sft_lr=1e-3, reward_lr=1e-3)
    assert_complete(run, "tldr", temperature=0.7)
    assert len(run.metrics("sft")) == 3 and len(run.metrics("reward")) == math.ceil(38 / 16)
    training = [x for (_, prompts, n, *_), _ in calls if n == 4 for x in prompts]  # eval has 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    assert len(training) == 16
    assert all("TITLE: My dog" in tokenizer.decode(x) for x in training)
    assert run.result()["win_rate_vs_reference"] is not None  # posts alone are evaluated


def test_run_on_comparisons_without_references(tmp_path):
    """Catches prompts that are lost to stage 3 because their rows are comparisons alone."""
    rows = [{"prompt": f"{word} cat", "chosen": " yes .", "rejected": " no"} for word in WORDS[:12]]
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, reward_batch=6,
                 prior=save_checkpoint(tmp_path / "prior"))
    assert run.result()["win_rate_vs_reference"] is None and len(run.metrics("brain")) == 4


@pytest.mark.parametrize("task", ["hh", "tldr"])
def test_offline_without_files(task, checkpoints, tmp_path, monkeypatch):
    """Catches a traceback, or a line that does not name the file and the flag, where nothing can be
    fetched; and a run that has been begun all the same."""
    monkeypatch.setattr(brain, {"hh": "HH_URL", "tldr": "TLDR_URL"}[task], "http://127.0.0.1:9")
    run = launch(tmp_path / "run", task=task, data_dir=tmp_path / "data",
                 prior=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward")
    name = {"hh": "harmless-base/train.jsonl.gz", "tldr": "datasets/tldr_3_filtered/train.jsonl"}
    assert run.status == 2 and len(run.stderr.splitlines()) == 1
    assert str(tmp_path / "data" / name[task]) in run.stderr and "--data_dir" in run.stderr
    assert not (run.folder / "config.json").exists()


# ------------------------------------------------------------------------------------------------
# Trust: what happens when things go wrong. Bad input, broken files, kills, full disks, NaN; then
# the statistics, which are trusted as well.
# ------------------------------------------------------------------------------------------------
PROMPT = "\n\nHuman: can you say why the cat was up ?\n\nAssistant:"
GOOD_ROWS = {  # one good row of each file format
    "jsonl": {"prompt": PROMPT, "reference": " so be it .", "chosen": " yes .",
              "rejected": " no ."},
    "hh": {"chosen": PROMPT + " it was a good day .", "rejected": PROMPT + " no !"},
    "posts": {"id": "t3_1", "subreddit": "AskReddit", "title": "a dog", "summary": "dog ran off",
              "post": "i say no to dogs .\nbut the dog , he say yes \u2013 so i run ."},
    "comparisons": {
        "info": {"id": "t3_1", "post": "my cat is on the sun .\nhow ?", "title": "a cat",
                 "subreddit": "cats"},
        "summaries": [{"text": " cat on sun", "policy": "sup1", "note": ""},
                      {"text": " sun !", "policy": "ref", "note": "ok"}],
        "choice": 1, "worker": "w", "batch": "batch3", "split": "train",
        "extra": {"confidence": 4}},
}


def write_tldr(folder: Path, posts: list, comparisons: list) -> Path:
    """OpenAI's layout: posts for both splits, comparisons in the first of the nineteen batches."""
    for split in ("train", "valid", "test"):
        write_lines(folder / f"datasets/tldr_3_filtered/{split}.jsonl", posts)
    for i in [*range(3, 21), 22]:
        path = folder / f"dataset/comparisons/batch{i}.json"
        write_lines(path, comparisons if i == 3 else [GOOD_ROWS["comparisons"]])
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> dict[str, str]:
    """Folders of good and of broken data and checkpoints, by name."""
    root = tmp_path_factory.mktemp("shelf")
    good = [GOOD_ROWS["jsonl"]] * 3

    def data(name: str, text: str | bytes) -> None:
        write_lines(root / name / "test.jsonl", good)
        raw = text if isinstance(text, bytes) else text.encode()
        (root / name / "train.jsonl").write_bytes(raw)

    first = json.dumps(GOOD_ROWS["jsonl"]) + "\n"
    data("data", first * 3)
    data("not_json", first + "prompt: why\n")
    data("cut_line", first * 2 + first[:40])
    data("no_object", first + "[1, 2]\n")
    data("no_prompt", first + '{"reference": "yes"}\n')
    data("blank_prompt", first + '{"prompt": "  "}\n')
    data("number", first + '{"prompt": "why", "reference": 3}\n')
    data("listed", first + '{"prompt": ["why"]}\n')
    data("surrogate", first + '{"prompt": "why \\ud800"}\n')
    data("only_chosen", first + '{"prompt": "why", "chosen": "yes"}\n')
    data("empty", "")
    data("latin", first.encode() + '{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
    data("utf16", first.encode("utf-16"))
    data("nested", first + '{"prompt": ' + "[" * 100_000 + "\n")
    data("digits", first + '{"prompt": ' + "9" * 5000 + "}\n")
    data("long", json.dumps({"prompt": "why " * 200}) + "\n")
    data("bare", '{"prompt": "why"}\n')
    data("pairless", '{"prompt": "why", "reference": " no ."}\n')
    write_lines(root / "no_test/train.jsonl", good)
    (root / "file").write_text("a file, no folder")

    for split in ("train", "test"):
        for name in ("hh", "hh_cut", "hh_plain", "hh_field", "hh_parted"):
            write_gz(root / name / f"harmless-base/{split}.jsonl.gz", [GOOD_ROWS["hh"]] * 50)
    path = root / "hh_cut/harmless-base/train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    (root / "hh_plain/harmless-base/train.jsonl.gz").write_text(json.dumps(GOOD_ROWS["hh"]))
    write_gz(root / "hh_field/harmless-base/train.jsonl.gz", [GOOD_ROWS["hh"], {"chosen": "x"}])
    write_gz(root / "hh_parted/harmless-base/train.jsonl.gz", [{"chosen": "a", "rejected": "b"}])
    comparison = GOOD_ROWS["comparisons"]
    write_tldr(root / "tldr", [GOOD_ROWS["posts"]], [comparison])
    write_tldr(root / "choice", [GOOD_ROWS["posts"]], [comparison, {**comparison, "choice": 2}])
    write_tldr(root / "untitled", [{**GOOD_ROWS["posts"], "title": None}], [comparison])

    save_checkpoint(root / "prior")
    save_checkpoint(root / "reward", reward=True)
    transformers.AutoModelForSequenceClassification.from_config(
        build_config(num_labels=2)).save_pretrained(root / "two")
    build_tokenizer().save_pretrained(root / "two")
    for name in ("no_tokenizer", "no_weights", "cut_weights", "bad_config", "no_eos", "many_tokens",
                 "no_config", "cut_tokenizer"):
        shutil.copytree(root / "prior", root / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "no_tokenizer" / name).unlink(missing_ok=True)
    weights = (root / "prior/model.safetensors").read_bytes()
    (root / "no_weights/model.safetensors").unlink()
    (root / "cut_weights/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "bad_config/config.json").write_text('{"model_type": "gpt_neox", ')
    (root / "no_config/config.json").unlink()
    text = (root / "prior/tokenizer.json").read_text()
    (root / "cut_tokenizer/tokenizer.json").write_text(text[: len(text) // 2])
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(root / "no_eos")
    build_tokenizer().save_pretrained(root / "many_tokens")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(50)])
    tokenizer.save_pretrained(root / "many_tokens")
    small = dict(vocab_size=416, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                 intermediate_size=64, max_position_embeddings=640, initializer_range=0.3)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small))
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=416, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    for name, model in (("bert", bert), ("t5", t5)):
        model.save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()} | {"root": str(root)}


LIMITS = "--max_prompt_tokens 64 --max_response_tokens 8 --max_comparison_tokens 8"
JSONL = f"--task jsonl --device cpu {LIMITS}"
BOTH = "--prior {prior} --reward {reward}"
BAD_INPUTS = [  # what is wrong | the command line | what the message must say, a regular expression
    # the command line itself
    ("unknown flag", "--stepz 5", "--stepz"),
    ("abbreviated flag", "--samples 5", "--samples"),
    ("stray word", "toy", "toy"),
    ("flag without its value", "--steps", "--steps"),
    ("unknown task", "--task summarise", "--task.*summarise"),
    ("unknown choice", "--target best", "--target.*best"),
    ("text for a number", "--steps many", "--steps.*many"),
    ("fraction for a count", "--steps 1.5", "--steps.*1.5"),
    ("no yes and no no", "--overwrite maybe", "--overwrite|maybe"),
    ("no steps", "--steps 0", "--steps.*1.*0"),
    ("negative batch", "--sft_batch -4", "--sft.batch.*-4"),
    ("kl_coef 0", "--kl_coef 0", "--kl.coef.*positive"),
    ("kl_coef below 0", "--kl-coef -0.1", "--kl.coef.*positive"),
    ("kl_coef nan", "--kl_coef nan", "--kl.coef.*nan"),
    ("infinite lr", "--lr inf", "--lr.*inf"),
    ("temperature 0", "--temperature 0", "--temperature.*positive"),
    ("negative penalty", "--missing_eos_penalty -1", "--missing.eos.penalty"),
    ("negative seed", "--seed -1", "--seed.*at least 0"),
    ("huge seed", "--seed 99999999999999999999999", "seed|long long|Overflow"),
    ("one sample per prompt", "--samples_per_prompt 1", "--samples.per.prompt.*2"),
    ("one sample in the evaluation", "--eval_samples 1", "--eval.samples.*2"),
    ("refresh no multiple of the step", "--prompts_per_step 16 --prompts_per_refresh 40",
     "--prompts.per.refresh.*multiple"),
    ("reverse with argmax", "--divergence reverse --target argmax", "reverse"),
    ("reverse with another baseline", "--divergence reverse --baseline none", "reverse"),
    ("base with prior", "--base {prior} --prior {prior}", "--base.*--prior"),
    ("jsonl without a model", JSONL + " --data_dir {data}", "--base or --prior"),
    ("jsonl without data", JSONL + " --prior {prior}", "--data_dir"),
    ("cuda without CUDA", "--device cuda", "cuda"),
    ("tldr without CUDA", "--task tldr --data_dir {tldr}", "--device cpu"),
    # data
    ("no such folder", f"{JSONL} {BOTH} --data_dir {{root}}/none", r"none/train\.jsonl"),
    ("data_dir is a file", f"{JSONL} {BOTH} --data_dir {{file}}", r"file/train\.jsonl"),
    ("no test file", f"{JSONL} {BOTH} --data_dir {{no_test}}", r"no_test/test\.jsonl"),
    ("row not JSON", f"{JSONL} {BOTH} --data_dir {{not_json}}", r"train\.jsonl:2: "),
    ("last row cut", f"{JSONL} {BOTH} --data_dir {{cut_line}}", r"train\.jsonl:3: "),
    ("row no object", f"{JSONL} {BOTH} --data_dir {{no_object}}", r"train\.jsonl:2: .*object"),
    ("row without prompt", f"{JSONL} {BOTH} --data_dir {{no_prompt}}", r"train\.jsonl:2: .*prompt"),
    ("blank prompt", f"{JSONL} {BOTH} --data_dir {{blank_prompt}}", r"train\.jsonl:2: .*prompt"),
    ("number for a text", f"{JSONL} {BOTH} --data_dir {{number}}", r"train\.jsonl:2: .*reference"),
    ("list for a text", f"{JSONL} {BOTH} --data_dir {{listed}}", r"train\.jsonl:2: .*prompt"),
    ("half a surrogate pair", f"{JSONL} {BOTH} --data_dir {{surrogate}}", r"train\.jsonl:2: "),
    ("chosen without rejected", f"{JSONL} {BOTH} --data_dir {{only_chosen}}",
     r"train\.jsonl:2: .*rejected"),
    ("empty file", f"{JSONL} {BOTH} --data_dir {{empty}}", r"jsonl.*train.*(empty|\b0 )"),
    ("invalid UTF-8", f"{JSONL} {BOTH} --data_dir {{latin}}", r"latin/train\.jsonl.*utf-8"),
    ("UTF-16", f"{JSONL} {BOTH} --data_dir {{utf16}}", r"utf16/train\.jsonl.*utf-8"),
    ("brackets without end", f"{JSONL} {BOTH} --data_dir {{nested}}", r"train\.jsonl:2: "),
    ("a number of 5000 digits", f"{JSONL} {BOTH} --data_dir {{digits}}", r"train\.jsonl:2: "),
    ("every prompt too long", f"{JSONL} {BOTH} --data_dir {{long}}", "train.*1 too long"),
    ("no reference to train on", JSONL + " --base {prior} --reward {reward} --data_dir {bare}",
     "reference"),
    ("no comparison to train on", JSONL + " --prior {prior} --data_dir {pairless}",
     "pair|chosen|comparison"),
    ("truncated gz", f"--task hh --hh_subsets harmless-base {BOTH} {LIMITS} --data_dir {{hh_cut}}",
     r"harmless-base/train\.jsonl\.gz"),
    ("no gz", f"--task hh --hh_subsets harmless-base {BOTH} {LIMITS} --data_dir {{hh_plain}}",
     r"harmless-base/train\.jsonl\.gz"),
    ("hh row lacks a side", f"--task hh --hh_subsets harmless-base {BOTH} {LIMITS} "
     "--data_dir {hh_field}", r"train\.jsonl\.gz:2: .*rejected"),
    ("nothing but broken rows", f"--task hh --hh_subsets harmless-base {BOTH} {LIMITS} "
     "--data_dir {hh_parted}", "train.*1 broken"),
    ("hh offline", f"--task hh --hh_subsets helpful-base {BOTH} {LIMITS} --data_dir {{hh}}",
     r"helpful-base/train\.jsonl\.gz.*--data_dir"),
    ("choice neither 0 nor 1", f"--task tldr --device cpu --base {{prior}} {LIMITS} "
     "--data_dir {choice}", r"batch3\.json:2: .*choice"),
    ("post without title", f"--task tldr --device cpu {BOTH} {LIMITS} --data_dir {{untitled}}",
     r"train\.jsonl:1: .*title"),
    # checkpoints and tokenizers
    ("longer than the context", f"--task jsonl --device cpu {BOTH} --data_dir {{data}} "
     "--max_prompt_tokens 600", "640.*--max_prompt_tokens"),
    ("comparisons over the context", "--task jsonl --device cpu --prior {prior} --data_dir {data} "
     "--max_comparison_tokens 600", "640.*--max_prompt_tokens"),
    ("no such checkpoint", JSONL + " --prior {root}/none --data_dir {data}", "/none"),
    ("hub offline", JSONL + " --prior nobody/nothing-at-all --data_dir {data}", "nobody/nothing"),
    ("checkpoint is a file", JSONL + " --prior {file} --data_dir {data}", "file"),
    ("BERT as prior", JSONL + " --prior {bert} --data_dir {data}", "bert"),
    ("T5 as prior", JSONL + " --prior {t5} --data_dir {data}", "t5|T5"),
    ("reward model as prior", JSONL + " --prior {reward} --data_dir {data}", "/reward .*"),
    ("reward model as base", JSONL + " --base {reward} --data_dir {data}", "/reward .*"),
    ("causal LM as reward", JSONL + " --prior {prior} --reward {prior} --data_dir {data}",
     "/prior .*score"),
    ("reward with two labels", JSONL + " --prior {prior} --reward {two} --data_dir {data}",
     "two.*label"),
    ("BERT without labels as reward", JSONL + " --prior {prior} --reward {bert} --data_dir {data}",
     "bert"),
    ("truncated weights", JSONL + " --prior {cut_weights} --data_dir {data}", "cut_weights"),
    ("no weights", JSONL + " --prior {no_weights} --data_dir {data}", "no_weights"),
    ("corrupt config", JSONL + " --prior {bad_config} --data_dir {data}", "bad_config"),
    ("no config", JSONL + " --prior {no_config} --data_dir {data}", "no_config"),
    ("no tokenizer", JSONL + " --prior {no_tokenizer} --data_dir {data}", "tokenizer.*no_tokenizer"
     "|no_tokenizer.*tokenizer"),
    ("corrupt tokenizer", JSONL + " --prior {cut_tokenizer} --data_dir {data}", "cut_tokenizer"),
    ("tokenizer without eos", JSONL + " --prior {no_eos} --data_dir {data}", "no_eos.*eos"),
    ("more tokens than embeddings", JSONL + " --prior {many_tokens} --data_dir {data}",
     "many_tokens.*embedding"),
    ("out below a file", "--steps 1 --out {file}/run", "file/run"),
    ("out is a file", "--steps 1 --out {file}", "file"),
]


def offline(*_, **__):
    raise OSError("the network is unreachable")


def refused(capfd, argv: list[str], status: int = 2) -> str:
    """The one line on stderr of a command that ends with `status`."""
    assert brain.main(argv) == status
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("brain.py: "), err
    assert len(err.splitlines()) == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("what, command, says", BAD_INPUTS, ids=[case[0] for case in BAD_INPUTS])
def test_bad_input(what, command, says, shelf, tmp_path, capfd, monkeypatch):
    """Catches a traceback or a dead-end message for a user's mistake, and half-begun folders."""
    if "CUDA" in what and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it retries for 46 s
    before = Path(shelf["file"]).read_text()
    error = refused(capfd, shlex.split(command.format_map(shelf)))
    assert re.search(says, error), error
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"
    assert Path(shelf["file"]).read_text() == before


# ------------------------------------------------------------------------------------------------
# Fuzzing the row parsers
# ------------------------------------------------------------------------------------------------
JUNK = [None, True, False, 0, 1, -1, 2, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", " ",
        "\n", "\x00", "\ud800", "\udfff\ud800", "\u2028", "caf\u00e9 \U0001f600", "a " * 99, [],
        {}, [[]], [None, 1], {"text": 1}, {"text": "x"}, [{"text": "x"}, {"text": "y"}],
        {"article": "x"}, {"0": {"text": "x"}}, [["x"], ["y"]], PROMPT, PROMPT + PROMPT,
        "\n\nAssistant:", "\n\nPOST: \n\nTL;DR:"]


def places(value, path=()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(
        value if isinstance(value, list) else [])
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


def mutate(rng: random.Random, row: dict) -> bytes:
    """A line of a file: the row with something wrong in its structure or in its bytes."""
    row = json.loads(json.dumps(row))
    for _ in range(rng.choice([0, 1, 1, 2])):  # drop, retype or move a part of it
        *path, key = rng.choice(places(row) or [("prompt",)])
        holder = row
        for step in path:
            holder = holder[step]
        if rng.random() < 0.3 and (isinstance(key, int) or key in holder):
            del holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
    text = json.dumps(row, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.2:  # a field given twice: the last one counts
        name = rng.choice(list(GOOD_ROWS["jsonl"]) + ["choice", "info", "summary", "title"])
        text = text[:-1] + f', "{name}": {json.dumps(rng.choice(JUNK))}' + "}"
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.choice([0, 1, 1, 5])] = rng.choice(
            [b"", bytes([rng.randrange(256)]), b'"', b"}", b"\\u", b"\\ud83d", b"9" * 50, b"["])
    return bytes(raw).replace(b"\n", b" ") + b"\n"


def is_right(example, kind: str, row: dict) -> bool:
    """Whether an example says what its row says."""
    prompt, reference, chosen, rejected = example
    if kind == "jsonl":
        return list(example) == [row.get(key) for key in GOOD_ROWS["jsonl"]]
    if kind == "hh":
        return (prompt + chosen, prompt + rejected) == (row["chosen"], row["rejected"]) and (
            prompt.endswith("\n\nAssistant:") and bool(chosen.strip() and rejected.strip()))
    info = row if kind == "posts" else row["info"]
    post = prompt.removeprefix(f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}"
                               "\n\nPOST: ").removesuffix("\n\nTL;DR:")
    texts = [" " + row["summary"].strip()] if kind == "posts" else [
        " " + row["summaries"][i]["text"].strip() for i in (row["choice"], 1 - row["choice"])]
    return info["post"].startswith(post) and texts == [y for y in example[1:] if y is not None]


@pytest.mark.parametrize("kind", list(GOOD_ROWS))
def test_mutated_rows_are_told_or_right(kind, tmp_path):
    """Catches a parser that passes a wrong type on, or that dies with another error than BadInput:
    a thousand mutations of a good row of each format, read from files."""
    rng, tokenizer, good = random.Random(kind), build_tokenizer(), GOOD_ROWS[kind]
    argv = {"jsonl": f"{JSONL} --prior x", "hh": f"--task hh --hh_subsets s --prior x {LIMITS}",
            "posts": f"--task tldr --prior x --reward y {LIMITS}",
            "comparisons": f"--task tldr --base x {LIMITS}"}[kind]
    cfg = brain.parse_config([*argv.split(), "--data_dir", str(tmp_path)])
    path = tmp_path / {"jsonl": "train.jsonl", "hh": "s/train.jsonl.gz",
                       "posts": "datasets/tldr_3_filtered/train.jsonl",
                       "comparisons": "dataset/comparisons/batch3.json"}[kind]
    write_gz(path, [good]) if kind == "hh" else write_tldr(tmp_path, [GOOD_ROWS["posts"]], [good])
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n")
    plain = brain.load_task(cfg, "train", tokenizer)
    others = list(plain)  # those of other files
    others.remove(next(example for example in plain if is_right(example, kind, good)))
    right = told = dropped = 0
    for _ in range(1000):
        line = mutate(rng, good)
        path.write_bytes(gzip.compress(line, 1) if kind == "hh" else line)
        try:
            examples = brain.load_task(cfg, "train", tokenizer)
        except brain.BadInput as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and len(message) < 1000, (line, message)
            assert path.name in message or "usable row" in message, (line, message)
            told += 1
            continue
        own = list(examples)
        for example in others:
            own.remove(example)
        dropped += not own  # broken by the data set's rules, or too long: counted by load_task
        for example in own:
            right += 1
            assert len(own) == 1 and example.prompt.strip(), line
            assert all(text is None or type(text) is str for text in example), line
            "".join(text or "" for text in example).encode()  # no surrogates
            assert is_right(example, kind, json.loads(line)), (line, example)
    assert min(right, told) >= 100, (right, told, dropped)  # both sides were tried


# ------------------------------------------------------------------------------------------------
# Kills, full disks, faults: a toy run of 16 + 16 + 20 steps whose responses have up to 3 tokens
# ------------------------------------------------------------------------------------------------
STAGES = {"sft": 0, "reward": 16, "brain": 32, "done": 52}  # stage: steps before it
SMALL = ("--task toy --device cpu --steps 20 --save_every 5 --max_response_tokens 3 "
         "--max_comparison_tokens 3 --sft_epochs 1 --sft_batch 128 --reward_epochs 1 "
         "--reward_batch 128 --samples_per_prompt 4 --prompts_per_step 4 --prompts_per_refresh 8 "
         "--eval_prompts 8 --out").split()
INTERRUPTED = """
import sys, brain
real, calls = brain.preference_loss, []
def loss(*args):  # Ctrl-C in the fifth step of the reward stage, at once: signals have no hour
    calls.append(args)
    if len(calls) == 5:
        raise KeyboardInterrupt
    return real(*args)
brain.preference_loss = loss
sys.exit(brain.main(sys.argv[1:]))
"""
DYING = """
import io, os, signal, sys, torch, brain
real, calls = torch.save, []
def save(state, file, *rest, **options):  # the third save is killed when half of it is written
    calls.append(file)
    if len(calls) == 3:
        whole = io.BytesIO()
        real(state, whole)
        file = file if hasattr(file, "write") else open(file, "wb")
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(state, file, *rest, **options)
torch.save = save
sys.exit(brain.main(sys.argv[1:]))
"""


def lines_of(out: Path) -> list[dict]:
    """What metrics.jsonl holds so far, whole lines only."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def fingerprint(out: Path) -> tuple:
    """All that must be equal in two runs of one command: metrics without timings, and weights."""
    metrics = [{k: v for k, v in line.items() if not k.startswith(("seconds_", "tokens_", "peak_"))}
               for line in lines_of(out)]
    weights = [(out / name / "model.safetensors").read_bytes()
               for name in ("prior", "reward", "policy") if (out / name).exists()]
    return metrics, weights


def figures(stdout: str) -> dict:
    """The JSON object of the last line of stdout, timings left out."""
    found = json.loads(stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if not key.startswith("seconds")}


def start(out: Path, code: str | None = None) -> subprocess.Popen:
    """A process that runs SMALL in `out`, through brain.py itself or through `code`."""
    env = dict(os.environ, PYTHONPATH=str(Path(brain.__file__).parent), PYTHONUNBUFFERED="1",
               OMP_NUM_THREADS=str(torch.get_num_threads()))
    script = [brain.__file__] if code is None else ["-c", code]
    return subprocess.Popen([sys.executable, *script, *SMALL, str(out)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def stop_at(process: subprocess.Popen, out: Path, lines: int) -> tuple[str, str]:
    """kill -9 once metrics.jsonl has so many lines; stdout and stderr of the process."""
    path, end = out / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    process.kill()
    return process.communicate(timeout=60)


def begins_at(stdout: str) -> int:
    """The step, counted over all stages, that a run's first line says it continues from."""
    found = re.search(r"stage (\w+)\W+step (\d+)", stdout.splitlines()[0])
    return STAGES[found[1]] + int(found[2]) if found else 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the stdout of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(out)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and not stderr, stderr
    stages = [line["stage"] for line in lines_of(out)]
    assert stages == ["sft"] * 16 + ["reward"] * 16 + ["brain"] * 20
    return out, stdout


@pytest.fixture(scope="module")
def brief(unbroken) -> list[str]:
    """The flags of a run that has the prior and the reward model already: stage 3 alone."""
    out = unbroken[0]
    return ["--prior", str(out / "prior"), "--reward", str(out / "reward"), "--steps", "8",
            "--save_every", "4"]


@pytest.fixture(scope="module")
def brief_run(brief, tmp_path_factory) -> Path:
    """The folder of such a run that nothing happened to."""
    out = tmp_path_factory.mktemp("brief") / "run"
    assert brain.main([*SMALL, str(out), *brief]) == 0
    return out


def test_a_killed_run_ends_as_if_it_had_not_been(unbroken, tmp_path):
    """Catches state that is not saved (optimizer, position, generators, the refresh's samples), a
    state file that a kill can spoil, metrics written twice, and work repeated without need."""
    out, written = tmp_path / "run", 0
    for number, (code, lines) in enumerate(
            [(None, 13), (INTERRUPTED, 999), (DYING, 999), (None, 42)]):
        process = start(out, code)
        stdout, stderr = stop_at(process, out, lines)
        if number == 1:
            assert process.returncode == 130 and stderr.count("\n") == 1, stderr
            assert stderr.startswith("brain.py: ") and "continue" in stderr
        else:
            assert process.returncode == -signal.SIGKILL, "it was killed too late to test anything"
        assert written - 5 <= begins_at(stdout) <= written, stdout.splitlines()[0]
        torch.load(out / "state.pt", weights_only=True)  # the state is whole
        written = len(lines_of(out))
    process = start(out)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and not stderr, stderr
    assert "brain" in stdout.splitlines()[0] and written - 5 <= begins_at(stdout) <= written
    assert fingerprint(out) == fingerprint(unbroken[0])
    assert figures(stdout) == figures(unbroken[1])


def interrupt(*_, **__):
    """Ctrl-C, at once; a signal may arrive a little later."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "at", ["first save", "first weights", "tokenizer", "evaluation", "report"])
def test_stopped_between_stages(at, brief, brief_run, tmp_path, monkeypatch, capfd):
    """Catches what only the process that trained knows: a run is stopped before its first state,
    between the weights and the tokenizer of policy/, in the evaluation, before its report."""
    out, base = tmp_path / "run", transformers.PreTrainedTokenizerBase

    def stopped(real, when):
        def wrapped(*args, **options):
            if when(*args):
                interrupt()
            return real(*args, **options)
        return wrapped

    owner, name, when = {
        "first save": (torch, "save", lambda *_: True),
        "first weights": (torch, "save", lambda state, *_: "model" in state),
        "tokenizer": (base, "save_pretrained", lambda *_: True),
        "evaluation": (brain, "sample", lambda *_: (out / "policy").exists()),
        "report": (Path, "write_text", lambda path, *_: path.name.startswith("report.md"))}[at]
    monkeypatch.setattr(owner, name, stopped(getattr(owner, name), when))
    assert "continue" in refused(capfd, [*SMALL, str(out), *brief], status=130)
    monkeypatch.undo()
    assert brain.main([*SMALL, str(out), *brief]) == 0
    assert fingerprint(out) == fingerprint(brief_run)
    assert not list(out.glob("*.part")) and (out / "policy/tokenizer.json").exists()
    assert (out / "report.md").read_text() == (brief_run / "report.md").read_text()


def test_a_finished_run_says_so(unbroken, capfd):
    """Catches a second run over the first, another last line, and a compared setting that changes
    no number."""
    out, stdout = unbroken
    before = fingerprint(out)
    for changes in ([], ["--save_every", "7", "--micro_batch_tokens", "500", "--data_dir", "x"]):
        assert brain.main([*SMALL, str(out), *changes]) == 0
        again = capfd.readouterr()
        assert "finished" in again.out and not again.err
        assert again.out.splitlines()[-1] == stdout.splitlines()[-1]
    assert fingerprint(out) == before


@pytest.mark.parametrize("change, says", [
    (["--kl_coef", "0.3"], "kl_coef.*0.4.*0.3"), (["--steps", "21"], "steps.*20.*21"),
    (["--seed", "1"], "seed.*0.*1"), (["--reward", "other"], "reward.*None.*other")])
def test_another_run_in_the_folder(change, says, unbroken, capfd):
    """Catches a run that goes on with other settings than its first half had."""
    before = fingerprint(unbroken[0])
    error = refused(capfd, [*SMALL, str(unbroken[0]), *change])
    assert re.search(says, error) and "--overwrite" in error
    assert fingerprint(unbroken[0]) == before


def test_the_folder_is_claimed_before_the_first_step(tmp_path, capfd, monkeypatch):
    """Catches a run that dies before it saves weights, and then goes on as another run."""
    monkeypatch.setattr(brain, "text_batches", interrupt)
    assert "continue" in refused(capfd, [*SMALL, str(tmp_path / "run")], status=130)
    assert re.search("seed was 0, is 1", refused(
        capfd, [*SMALL, str(tmp_path / "run"), "--seed", "1"]))


@pytest.mark.parametrize("content", ["half", "empty", "pickle"])
def test_a_corrupt_state(content, brief, brief_run, tmp_path, capfd):
    """Catches a traceback, or a pickle that is executed, where a run's own file is broken."""
    out = tmp_path / "run"
    shutil.copytree(brief_run, out)
    raw, trap = (out / "state.pt").read_bytes(), tmp_path / "executed"
    (out / "state.pt").write_bytes({"half": raw[: len(raw) // 2], "empty": b"",
                                    "pickle": f"cos\nmkdir\n(S'{trap}'\ntR.".encode()}[content])
    assert "--overwrite" in refused(capfd, [*SMALL, str(out), *brief])
    assert not trap.exists()


def test_overwrite_starts_afresh(brief, brief_run, tmp_path):
    """Catches a run that continues, or refuses other settings, though it was told to overwrite."""
    out = tmp_path / "run"
    shutil.copytree(brief_run, out)
    (out / "state.pt").write_bytes(b"")
    assert brain.main([*SMALL, str(out), *brief, "--steps", "2", "--overwrite"]) == 0
    assert [line["step"] for line in lines_of(out)] == [0, 1]
    assert json.loads((out / "config.json").read_text())["steps"] == 2


class Fault:
    """Says when to strike: once metrics.jsonl has so many lines. Keeps the state of that moment."""

    def __init__(self, out: Path, lines: int):
        self.out, self.lines, self.state = out, lines, None

    def __call__(self) -> bool:
        if self.state is None and len(lines_of(self.out)) >= self.lines:
            path = self.out / "state.pt"
            self.state = path.read_bytes() if path.exists() else b""
        return self.state is not None


def full_disk(fault: Fault, kind: str, monkeypatch) -> None:
    """From a step on, nothing large can be written, in one of the ways in which that shows."""
    real = {name: getattr(torch if name == "save" else os, name) for name in ("save", "fsync")}

    def full(*_):
        raise OSError(28, "No space left on device")

    def save(state, file, *rest, **options):
        if not fault():
            return real["save"](state, file, *rest, **options)
        if kind == "error":  # a part of it is written
            (file if hasattr(file, "write") else open(file, "wb")).write(b"PK\x03\x04")
            full()
        if kind == "limit":  # the system refuses to write past this size
            resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
        real["save"](state, file, *rest, **options)
        if kind == "export":  # the state fits, the model does not
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(os, "fsync", lambda fd: full() if kind == "fsync" and fault()
                        else real["fsync"](fd))


@pytest.mark.parametrize("kind", ["error", "fsync", "limit", "export"])
def test_full_disk(kind, brief, brief_run, tmp_path, capfd, monkeypatch):
    """Catches a save that destroys the state before it, and a traceback where the disk is full."""
    out = tmp_path / "run"
    fault, before = Fault(out, lines=8), resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk(fault, kind, monkeypatch)
    try:
        error = refused(capfd, [*SMALL, str(out), *brief], status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.undo()
    assert fault.state and (kind == "export" or "brain" in error and "step" in error), error
    torch.load(io.BytesIO(fault.state), weights_only=True)
    assert kind == "export" or (out / "state.pt").read_bytes() == fault.state
    assert brain.main([*SMALL, str(out), *brief]) == 0  # once there is room
    assert fingerprint(out) == fingerprint(brief_run)


def test_full_disk_as_a_run_continues(brief, brief_run, tmp_path, capsys, monkeypatch):
    """Catches a run that writes over its own config.json before it knows that it can."""
    out = tmp_path / "run"
    monkeypatch.setattr(torch, "save", interrupt)
    assert brain.main([*SMALL, str(out), *brief]) == 130  # Ctrl-C at the first save
    monkeypatch.undo()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        status = brain.main([*SMALL, str(out), *brief])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status in (1, 2)
    assert brain.main([*SMALL, str(out), *brief]) == 0, capsys.readouterr().err
    assert fingerprint(out) == fingerprint(brief_run)


def poison(kind: str, fault: Fault, monkeypatch) -> None:
    """From a step on, a number of the named kind is not finite."""
    score, forward = brain.score_reward, transformers.GPTNeoXForCausalLM.forward
    bad = math.inf if kind == "infinite reward" else math.nan

    def poisoned_score(*args, **options):
        reward = score(*args, **options)
        if fault():
            reward = reward * torch.ones_like(reward).flatten().index_fill(
                0, torch.tensor([reward.numel() - 1]), bad).view_as(reward)
        return reward

    def poisoned_forward(*args, **options):
        output = forward(*args, **options)
        if not fault() or torch.is_grad_enabled() != (kind != "logit of a sample"):
            return output
        if kind == "gradient":
            output.logits.register_hook(lambda gradient: gradient * math.nan)
        else:
            output.logits = output.logits * torch.ones_like(output.logits).index_fill(
                0, torch.tensor([0], device=output.logits.device), math.nan)
        return output

    if "reward" in kind:
        monkeypatch.setattr(brain, "score_reward", poisoned_score)
    else:
        monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "forward", poisoned_forward)


@pytest.mark.parametrize("stage, kind", [
    ("sft", "logit of a step"), ("sft", "gradient"), ("reward", "reward of a pair"),
    ("brain", "reward"), ("brain", "infinite reward"), ("brain", "logit of a step"),
    ("brain", "logit of a sample"), ("brain", "gradient"), ("eval", "reward")])
def test_what_is_not_finite_stops_the_run(stage, kind, brief, tmp_path, capfd, monkeypatch):
    """Catches NaN that reaches the weights, a batch that is skipped in silence, a message that does
    not say where."""
    out, at = tmp_path / "run", {"sft": 7, "reward": 23, "brain": 6, "eval": 8}[stage]
    fault = Fault(out, lines=at)
    poison(kind, fault, monkeypatch)
    flags = brief if stage in ("brain", "eval") else []
    error = refused(capfd, [*SMALL, str(out), *flags], status=1)
    here = {"sft": r"sft\W+step 7\b", "reward": r"reward\W+step 7\b", "brain": r"brain\W+step 6\b",
            "eval": "eval"}[stage]
    assert re.search(here, error) and "finite" in error and "TL;DR" in error, error
    assert ("gradient" in error) == (kind == "gradient")  # found where it began
    assert len(lines_of(out)) == at  # the step is not logged as if it had been good
    assert (out / "state.pt").read_bytes() == fault.state
    torch.load(io.BytesIO(fault.state), weights_only=True)


@pytest.mark.parametrize("temperature", [1.3, 0.97])
def test_scored_is_not_sampled(temperature, brief, tmp_path, capfd, monkeypatch):
    """Catches a guard that does not notice a sampler with another temperature than the score's."""
    real = brain.sample
    monkeypatch.setattr(brain, "sample", lambda *args, **options: real(
        *args, **options | {"temperature": temperature}))
    error = refused(capfd, [*SMALL, str(tmp_path / "run"), *brief], status=1)
    assert "sampled" in error and re.search(r"brain\W+step 0\b", error), error
    assert not lines_of(tmp_path / "run")


def test_report_says_what_was_run(unbroken):
    """Catches a report without what its figures rest on, and a chart that is not of the run."""
    out, found = unbroken[0], json.loads(unbroken[1].splitlines()[-1])
    text = (out / "report.md").read_text()
    assert "8 held-out prompts × 4 samples" in text and f"{found['tie_share']:.3f} of pairs" in text
    assert "20 steps, kl_coef 0.4, seed 0, on cpu" in text and "nats a token" in text
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == ["prior", "policy", "reference", "posterior"]
    low, high = found["win_rate_vs_prior_ci"]
    cells = dict(zip(table[0], table[3], strict=True))
    assert cells[" win rate vs prior "].strip() == (
        f"{found['win_rate_vs_prior']:.3f} [{low:.3f}, {high:.3f}]")
    assert cells[" kl to prior "].strip() == (
        f"{found['kl_to_prior']:.3f} ± {found['kl_to_prior_se']:.3f}")
    x, y = (re.search(rf"{axis}.*\[(.*)\]", text)[1].split(", ") for axis in ("x-axis", "line"))
    seen = {(f"{line['refresh_kl']:.3f}", f"{line['refresh_reward']:.3f}")
            for line in lines_of(out) if "refresh_kl" in line}
    assert set(zip(x, y, strict=True)) <= seen and 5 <= len(x) <= 13
    assert list(map(float, x)) == sorted(map(float, x))
    assert max(map(float, x)) == max(float(kl) for kl, _ in seen)


def test_ties_are_counted(checkpoints, hh_base):
    """Catches a share of ties that counts prompts, or wins: against rewards written out."""
    assert hh_base.result()["tie_share"] == 0  # rewards of different texts do not tie
    rewards = torch.tensor([[1., 2.], [3., 3.]]), torch.tensor([[2., 2.], [3., 4.]])
    assert brain.preference(*rewards).tolist() == [0.25, 0.25]  # (0 + 0 + ½ + ½)/4, likewise


def test_sampled_kl_agrees_with_the_exact_one(unbroken):
    """Catches a KL with the wrong sign, of the wrong samples or per token, a wrong error bar."""
    found = json.loads(unbroken[1].splitlines()[-1])
    exact, sampled = found["kl_to_prior_exact"], found["kl_to_prior_sampled"]
    error = found["kl_to_prior_sampled_se"]
    assert 0 < error < 0.5 and abs(sampled - exact) <= 5 * error


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def wilson_many(mean: numpy.ndarray, error: numpy.ndarray, prompts: int) -> tuple:
    """Wilson's interval at as many trials as have this standard error, for many data sets: the two
    roots in w of (mean - w)^2 = z^2 w (1 - w) / trials."""
    squared = numpy.where(error > 0, error, 1) ** 2
    trials = numpy.where(error > 0, mean * (1 - mean) / squared, prompts)
    z2 = 1.96**2 / trials
    root = numpy.sqrt((2 * mean + z2) ** 2 - 4 * (1 + z2) * mean**2)
    return (2 * mean + z2 - root) / (2 + 2 * z2), (2 * mean + z2 + root) / (2 + 2 * z2)


def outcomes_of(rate: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The values of a prompt's share of wins, 4 against 4 samples, and how likely each is, where
    the win rate is `rate`: prompts of two kinds, one that the policy wins nearly always, one that
    it loses; three levels of reward, so there are ties. Exact, from all 3^8 outcomes."""
    level = torch.tensor(list(itertools.product(range(3), repeat=4))).double()  # (81, 4)
    better, worse = torch.tensor([0.05, 0.2, 0.75]), torch.tensor([0.7, 0.25, 0.05])
    likely = [p.double()[level.long()].prod(-1) for p in (better, worse)]  # (81,) each
    share = brain.preference(*(x.reshape(-1, 4) for x in (
        level[:, None].expand(-1, 81, -1), level.expand(81, -1, -1))))  # (81²,)
    wins = (likely[0][:, None] * likely[1]).flatten().double()
    wins, losses = wins / wins.sum(), (likely[1][:, None] * likely[0]).flatten() / wins.sum()
    best = (wins * share).sum()  # of the kind that the policy wins
    mixed = (rate - (1 - best)) / (2 * best - 1)
    values, index = share.double().unique(return_inverse=True)
    chance = torch.zeros_like(values).index_add_(0, index, mixed * wins + (1 - mixed) * losses)
    return values.numpy(), (chance / chance.sum()).numpy()


@pytest.mark.parametrize("rate, prompts", [
    (0.1, 500), (0.15, 100), (0.3, 30), (0.5, 30), (0.5, 300), (0.7, 60), (0.9, 200)])
def test_win_rate_intervals_cover(rate, prompts):
    """Catches intervals that take the pairs of a prompt for independent, or ties for losses: 20,000
    data sets with a known win rate."""
    rng, (values, chance) = numpy.random.default_rng(int(1000 * rate) + prompts), outcomes_of(rate)
    assert abs((values * chance).sum() - rate) < 1e-6  # a tie is half a win
    counts = rng.multinomial(prompts, chance, size=20_000)  # (data sets, values)
    mean = counts @ values / prompts
    variance = (counts @ values**2 - prompts * mean**2) / (prompts - 1)
    low, high = wilson_many(mean, numpy.sqrt(variance.clip(0) / prompts), prompts)
    for i in range(0, 20_000, 400):  # the formula above is brain.py's
        wins = torch.from_numpy(values.repeat(counts[i]))
        assert brain.wilson(wins)[1] == pytest.approx([low[i], high[i]], abs=1e-9)
        assert brain.wilson(wins)[0] == pytest.approx(mean[i], abs=1e-12)
    coverage = ((low <= rate) & (rate <= high)).mean()
    assert 0.93 <= coverage <= 0.97, coverage


@pytest.mark.parametrize("wins", [[0.0] * 30, [1.0] * 30, [0.5] * 30, [0.0] * 29 + [1.0]])
def test_win_rate_intervals_of_extreme_data(wins):
    """Catches a division by zero, or an interval of no width, where all prompts agree."""
    rate, (low, high) = brain.wilson(torch.tensor(wins))
    assert -1e-9 < low < rate + 1e-9 and rate - 1e-9 < high < 1 + 1e-9 and high - low > 0.1


def test_kl_intervals_cover(monkeypatch):
    """Catches an error bar from all samples as if they were independent, or from a biased KL:
    20,000 draws of 64 prompts with 4 samples each, from a population whose exact KL is known."""
    torch.manual_seed(0)
    log_p = torch.randn(2000, 32, dtype=torch.float64).log_softmax(-1)  # prompts, responses
    drift = torch.rand(2000, 1) * torch.randn(2000, 32, dtype=torch.float64)
    log_q = (log_p + drift).log_softmax(-1)
    truth = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    prompt = torch.randint(2000, (20_000, 64, 1))
    cdf = (log_q.exp().cumsum(-1).clamp(max=1) + torch.arange(2000)[:, None]).flatten()
    place = torch.searchsorted(cdf, prompt + torch.rand(20_000, 64, 4, dtype=torch.float64))
    place = place.minimum(32 * prompt + 31)  # rounding at the end of a row
    ratio = (log_q - log_p).flatten()[place]  # (20,000, 64, 4)
    estimate, error = ratio.mean((1, 2)), ratio.mean(-1).std(-1) / 8
    run = SimpleNamespace(tokenizer=build_tokenizer(), cfg=SimpleNamespace(eval_samples=4))
    zeros = torch.zeros(64, 4, dtype=torch.float64)
    for i in range(0, 20_000, 1000):  # the formula above is that of the evaluation
        scores = {k: zeros for k in ("reward", "raw_reward", "eos", "log_prior")}
        batch = SimpleNamespace(scores=scores | {"log_proposal": ratio[i]}, length=zeros)
        monkeypatch.setattr(brain, "sample_batches", lambda *_, batch=batch: [batch])
        row = brain.evaluate(run, {}, [brain.Example("x")] * 64, None)[0]["policy"]
        assert row["kl_to_prior"] == pytest.approx(estimate[i].item())
        assert row["kl_to_prior_se"] == pytest.approx(error[i].item())
    coverage = ((estimate - truth).abs() <= 1.96 * error).double().mean()
    assert 0.93 <= coverage <= 0.97, coverage


# ---- The front page -----------------------------------------------------------------------------

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def commands(pattern: str) -> list[str]:
    """Every command of the README that matches, from code blocks and from `inline code` alike."""
    joined = README.replace("\\\n", " ")
    return sorted({found.strip() for found in re.findall(pattern, joined)})


@pytest.mark.parametrize("command", commands(r"python brain\.py[^`\n]*"))
def test_brain_commands_of_the_readme_parse(command):
    """Catches a command on the front page with a flag or a value that does not exist."""
    words = shlex.split(command.split("#")[0])[2:]
    if "--help" not in words:
        assert isinstance(brain.parse_config(words), brain.Config)


@pytest.mark.parametrize("command", commands(r"\bmake [a-z]+"))
def test_make_commands_of_the_readme_exist(command):
    """Catches a command on the front page that the Makefile does not know."""
    rules = re.findall(r"^([a-z]+):", (HERE / "Makefile").read_text(), re.M)
    assert command.split()[1] in rules


@pytest.mark.parametrize("command", commands(r"python test_brain\.py[^`\n]*"))
def test_measuring_commands_of_the_readme_parse(command):
    """Catches a command behind one of the README's figures that cannot be repeated."""
    name, *words = shlex.split(command)[2:]
    assert name in PROGRAMS
    if name in ("bench", "trl"):
        assert parse_bench(words).samples


def test_every_flag_in_the_readme_exists():
    """Catches a flag named in the text that was renamed or removed in brain.py."""
    theirs = README[README.index("## Outgrowing one GPU"):README.index("## Licence")]
    named = set(re.findall(r"`--([a-z_]+)", README.replace(theirs, "")))
    known = {f.name for f in dataclasses.fields(brain.Config)} | {"help"}
    assert named <= known, named - known


def test_the_loss_example_of_the_readme_runs():
    """Catches an example that no longer runs, or whose loss does not fall."""
    block = README[README.index("## Using the loss"):].split("```python\n")[1].split("```")[0]
    said = subprocess.run([sys.executable, "-c", block], cwd=HERE, text=True, capture_output=True)
    losses = [float(line.split()[0]) for line in said.stdout.splitlines()]
    assert said.returncode == 0 and losses == sorted(losses, reverse=True) and len(losses) == 3


def test_every_metric_is_explained():
    """Catches a metric that is written but not in the README's table, up to the timings."""
    source = (HERE / "brain.py").read_text(encoding="utf-8")
    table = README[README.index("## Metrics"):README.index("## Departures")]
    for name in ("reward_spread", "ess_alpha", "ess_beta", "alpha_largest", "kl_to_prior",
                 "log_ratio_min", "log_ratio_max", "eos_share", "response_tokens", "gradient_norm",
                 "learning_rate", "refresh_reward", "refresh_kl", "refresh_kl_sd",
                 "kl_to_posterior", "accuracy", "peak_memory_gb"):
        assert f'"{name}"' in source and f"`{name}`" in table, name


# ---- The README's recipe for TRL's trainer; skipped where TRL is not installed -------------------


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL 1.16")

GUIDE = Path(__file__).parent / "README.md"
MARK = "# recipe.py: BRAIn on TRL's trainer"
N, STEPS, ITERATIONS, KL_COEF, TEMPERATURE = 8, 80, 4, 0.5, 0.7
# 2 prompts x 8 responses per micro-batch, 2 micro-batches per step, 2 processes: 64 samples per
# refresh, which 4 steps then use, all of them each time. fp32, since 1e-5 is asked for.
FLAGS = {"num_generations": N, "per_device_train_batch_size": 2 * N, "num_iterations": ITERATIONS,
         "gradient_accumulation_steps": 2, "beta": KL_COEF, "temperature": TEMPERATURE,
         "learning_rate": 3e-3, "max_completion_length": 12, "max_steps": STEPS, "bf16": "false",
         "disable_dropout": "true", "logging_steps": 1, "report_to": "none", "use_cpu": "true",
         "disable_tqdm": "true", "seed": 1}

# Runs the recipe's own class and records, for all samples of the second refresh in their second
# step (so prior, proposal and policy are three different models): the ids, the gradient of the
# trainer's final loss with respect to the whole-response log-probabilities, the weights of policy
# and proposal. Micro-step = one micro-batch on each process; 8 of them per refresh.
PROBE = '''
import sys
import recipe, torch
from datasets import Dataset
from trl import RLOOConfig, TrlParser

brain_loss, leaves, records = recipe.brain_loss, [], []

def recorded_loss(log_policy, *args, **kwargs):
    log_policy.retain_grad()
    leaves.append(log_policy)
    return brain_loss(log_policy, *args, **kwargs)

class Probe(recipe.BrainTrainer):
    def weights(self):
        model = self.accelerator.unwrap_model(self.model)
        return {name: value.clone() for name, value in model.state_dict().items()}

    def _generate_and_score_completions(self, inputs):
        self.proposal = self.weights()
        return super()._generate_and_score_completions(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        step, policy = self._step, self.weights()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if step in (10, 11):
            batch = self._buffered_inputs[step % self.args.steps_per_generation]
            keys = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"
            records.append({key: batch[key] for key in keys}
                           | {"policy": policy, "proposal": self.proposal,
                              "gradient": leaves[-1].grad})
        leaves.clear()
        return loss

recipe.brain_loss = recorded_loss
parser = TrlParser(RLOOConfig)
args, (model, prompts) = parser.parse_args_and_config(return_remaining_strings=True)
trainer = Probe(model, recipe.brevity, args, train_dataset=Dataset.from_json(prompts))
trainer.train()
torch.save(records, f"{args.output_dir}/rank{trainer.accelerator.process_index}.pt")
trainer.accelerator.end_training()
'''


def recipe_text():
    (block,) = re.findall(rf"^```python\n({re.escape(MARK)}\n.*?)^```$", GUIDE.read_text("utf-8"),
                          re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the GUIDE's recipe.py, a tiny random GPT-NeoX, a tokenizer and 32 prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trl")
    (folder / "recipe.py").write_text(recipe_text(), "utf-8")
    (folder / "probe.py").write_text(PROBE, "utf-8")
    end, letters = "<|endoftext|>", "abcdefghijklmno"
    vocabulary = {word: index for index, word in enumerate([end, *letters])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end)
    tokenizer.save_pretrained(folder / "model")  # no pad token: TRL takes eos, as with Pythia
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=16, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                           num_attention_heads=2, max_position_embeddings=64, bos_token_id=0,
                           eos_token_id=0, initializer_range=0.3)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    prompts = [" ".join(letters[(i * j + j * j) % 15] for j in range(2 + i % 4)) for i in range(60)]
    prompts = list(dict.fromkeys(prompts))[:32]  # of 2 to 5 tokens, no two alike
    assert len(prompts) == 32
    rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(rows), "utf-8")
    return folder


def launch_trl(folder, script, **flags):
    """`accelerate launch` with two processes; fails with the output's end if the run does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
               "--dynamo_backend=no", "--main_process_port=0", script, "model", "prompts.jsonl"]
    for name, value in {**FLAGS, **flags}.items():
        command += [f"--{name}", str(value)]
    env = os.environ | {"PYTHONPATH": str(Path(brain.__file__).parent), "OMP_NUM_THREADS": "1",
                        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=80)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]


@needs_trl
def test_recipe_is_short():
    assert len(recipe_text().splitlines()) <= 60


@needs_trl
def test_recipe_learns_on_two_processes(folder):
    """The loss falls and the reward rises.

    BRAIn's loss jumps back to log n - H(alpha_hat) at each refresh, so it is compared at the same
    age, in two ways: over the steps that share one refresh's samples (the last against the first),
    and at age 0, at the refresh itself (the last quarter of the refreshes against the first). The
    reward is that of each refresh's new samples.
    """
    launch_trl(folder, "recipe.py", output_dir="out")
    state = json.loads((folder / f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    # Each refresh draws 4 of the 32 prompts per process, so 20 of them are 5 epochs with two
    # processes; with one, which is what accelerate's --cpu starts, they would be 2.5.
    assert state["epoch"] == 5.0
    log = [row for row in state["log_history"] if "loss" in row]
    loss = torch.tensor([row["loss"] for row in log]).view(-1, ITERATIONS)  # (refreshes, age)
    reward = torch.tensor([row["reward"] for row in log if "reward" in row])  # (refreshes,)
    quarter = len(loss) // 4
    print(f"\nloss by age {loss.mean(0).tolist()}; at age 0 {loss[:quarter, 0].mean():.3f} -> "
          f"{loss[-quarter:, 0].mean():.3f}; reward {reward[:quarter].mean():.3f} -> "
          f"{reward[-quarter:].mean():.3f}")
    assert len(reward) == len(loss) == STEPS // ITERATIONS
    assert loss[:, -1].mean() < 0.8 * loss[:, 0].mean()
    assert (loss[:, -1] < loss[:, 0]).float().mean() > 0.75
    assert loss[-quarter:, 0].mean() < 0.8 * loss[:quarter, 0].mean()
    assert reward[-quarter:].mean() > reward[:quarter].mean() + 0.5


def response_log_prob(model, prompt, response):
    """The plain way: one response, no padding, no cache; the sum over the response's tokens."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


@torch.no_grad()
@needs_trl
def test_trainer_coefficients_are_those_of_snis_weights(folder):
    """Minus the trainer's gradient = alpha_hat - beta_hat, recomputed from ids and weights."""
    from transformers import GPTNeoXForCausalLM

    launch_trl(folder, "probe.py", output_dir="probe", max_steps=6)
    records = [torch.load(folder / f"probe/rank{rank}.pt") for rank in (0, 1)]
    models = {}
    for name in ("prior", "proposal", "policy"):
        models[name] = GPTNeoXForCausalLM.from_pretrained(folder / "model")
        if name != "prior":  # the same on both processes, and in both micro-batches of the step
            for record in records[0] + records[1]:
                assert all(torch.equal(record[name][key], value)
                           for key, value in records[0][0][name].items())
            models[name].load_state_dict(records[0][0][name])
        models[name].double().eval()
    groups = collections.defaultdict(list)  # by the prompt's ids, wherever the rows were computed
    for record in records[0] + records[1]:
        # the trainer divides by its 2 prompts per micro-batch and its 2 micro-batches per step
        coefficient = (-record["gradient"] * 2 * 2).flatten()
        prompts, seen, responses, masks = (record[key].flatten(0, -2) for key in (
            "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
        for i, value in enumerate(coefficient):
            prompt = tuple(prompts[i, seen[i].bool()].tolist())
            groups[prompt].append((value, responses[i, masks[i].bool()].tolist()))
    assert [len(group) for group in groups.values()] == [N] * 8
    error, spread = [], []
    for prompt, group in groups.items():
        log_prob = {name: torch.stack([response_log_prob(model, list(prompt), response)
                                       for _, response in group])[None]  # (1, n)
                    for name, model in models.items()}
        reward = torch.tensor([[-len(response) / 4 for _, response in group]]).double()
        alpha_hat, beta_hat = brain.snis_weights(log_prob["policy"], log_prob["prior"],
                                                 log_prob["proposal"], reward, KL_COEF)
        coefficient = torch.stack([value for value, _ in group])
        error.append((coefficient - (alpha_hat - beta_hat)).abs().max())
        spread.append((log_prob["policy"] - log_prob["prior"]).std())
    print(f"\nlargest difference {max(error):.1e} over {8 * N} samples; "
          f"smallest s.d. of log policy - log prior {min(spread):.2f} nats")
    assert min(spread) > 0.01  # or the check would not see a missing prior
    assert max(error) < 1e-5


# ------------------------------------------------------------------------------------------------
# One row per sample: what brain.py does not do. The oracle of the tests and the other side of the
# benchmark, at its best: only response positions pass the head, no mask where lengths are equal.
# ------------------------------------------------------------------------------------------------


def plain_rows(prompts, responses, device="cpu"):
    """Ids (B·n, P + R), prompts padded on the left, responses on the right; R; model options."""
    P, R = max(map(len, prompts)), max(len(y) for ys in responses for y in ys)
    rows = [(P - len(x), x + y, R - len(y))
            for x, ys in zip(prompts, responses, strict=True) for y in ys]
    ids = torch.tensor([[0] * left + row + [0] * right for left, row, right in rows], device=device)
    if not any(left or right for left, _, right in rows):
        return ids, R, {}
    real = torch.tensor([[0] * left + [1] * len(row) + [0] * right for left, row, right in rows],
                        device=device)
    return ids, R, {"attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}


def plain_log_prob(model, prompts, responses, temperature=1.0):
    """log q(y|x), (B, n): one forward pass over B·n rows. Ragged lengths are fine."""
    ids, R, options = plain_rows(prompts, responses, model.device)
    options = {name: value[:, :-1] for name, value in options.items()}
    logits = model(ids[:, :-1], logits_to_keep=R, use_cache=False, **options).logits  # (B·n, R, V)
    log_p = (logits.float() / temperature).log_softmax(-1)
    token = log_p.gather(-1, ids[:, -R:, None]).squeeze(-1)  # (B·n, R)
    length = torch.tensor([[len(y)] for ys in responses for y in ys], device=ids.device)
    token = token.where(torch.arange(R, device=ids.device) < length, 0)
    return token.sum(-1).view(len(prompts), -1)


def plain_reward(reward_model, prompts, responses):
    """The reward at each response's last token, (B, n): one forward pass over B·n rows."""
    ids, R, options = plain_rows(prompts, responses, reward_model.device)
    last = [ids.shape[1] - R + len(y) - 1 for ys in responses for y in ys]
    hidden = reward_model.base_model(ids, use_cache=False, **options).last_hidden_state
    score = reward_model.score(hidden[range(len(last)), last])  # (B·n, 1)
    return score.float().view(len(prompts), -1)


def plain_sample(model, prompts, n, max_new_tokens):
    """n responses to each of B prompts of equal length, (B·n, R) ids, by `generate`."""
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=n,
                         do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
                         min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens)
    return out[:, ids.shape[1]:]


# ------------------------------------------------------------------------------------------------
# The benchmark: `python test_brain.py bench --help`
# ------------------------------------------------------------------------------------------------
ROW = "{:9} {:>3} {:>7}   {:>8} {:>8}   {:>8} {:>8}   {:>5} {:>5}  {}".format
LAYOUTS = ("packed", "plain")
STATUS = Path("/proc/self/status")  # getrusage would inherit the parent's peak


def parse_bench(argv):
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(
        prog="test_brain.py bench", description="brain.py's layout against one row per sample")
    for flag, default, text in [
            ("hidden", 512, "width of the model"), ("layers", 6, "its depth"),
            ("heads", 8, "its attention heads"), ("vocabulary", 8192, "its vocabulary"),
            ("prompt_tokens", 350, "P"), ("response_tokens", 53, "R"),
            ("prompts", 4, "prompts that are sampled for at a time"),
            ("micro_batch", 1, "prompts in a pass of scoring, reward and step"),
            ("repeats", 5, "measurements of each, after one to warm up; the median counts"),
            ("threads", 2, "CPU threads")]:
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="n")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu: fp32; cuda: bf16 autocast, the policy's weights in fp32")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # a layout and n
    return parser.parse_args(argv)


class Bench:
    """Three models with random weights, and both layouts of the four things that are measured."""

    def __init__(self, args):
        self.args, cuda = args, args.device == "cuda"
        torch.manual_seed(0)
        config = transformers.GPTNeoXConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, intermediate_size=4 * args.hidden, num_labels=1,
            max_position_embeddings=args.prompt_tokens + args.response_tokens,
            bos_token_id=None, eos_token_id=None)  # nothing stops a response
        self.policy, self.prior = (
            transformers.AutoModelForCausalLM.from_config(config).eval().to(args.device)
            for _ in range(2))
        self.reward_model = transformers.AutoModelForSequenceClassification.from_config(config)
        for model in (self.prior, self.reward_model):  # frozen, in bf16 on CUDA, as in brain.py
            dtype = torch.bfloat16 if cuda else torch.float32
            model.eval().requires_grad_(False).to(args.device, dtype)
        self.autocast = functools.partial(torch.autocast, args.device, torch.bfloat16, enabled=cuda)
        self.parameters = sum(parameter.numel() for parameter in self.policy.parameters())
        self.name = torch.cuda.get_device_name() if cuda else "cpu"

    def draw(self, *shape):
        """Random ids, nested lists."""
        return torch.randint(self.args.vocabulary, shape).tolist()

    def step(self, log_prob, *data):
        """A forward and backward pass; the losses of the two layouts have the same weights."""
        log_policy = log_prob(self.policy, *data)  # (B, n)
        now = log_policy.detach()
        reward = torch.linspace(-1, 1, now.shape[1], device=now.device).expand_as(now)
        brain.brain_loss(log_policy, now, now, reward, 1.0)[0].mean().backward()
        gradient = [parameter.grad for parameter in self.policy.parameters()]
        self.policy.zero_grad()
        return now, gradient

    def race(self, stage, B, n):
        """{layout: what to time} for B prompts and n samples."""
        prompts, R = self.draw(B, self.args.prompt_tokens), self.args.response_tokens
        if stage == "sampling":
            runs = (lambda: brain.sample(self.policy, prompts, n, R, eos_id=-1),
                    lambda: plain_sample(self.policy, prompts, n, R))
        else:
            responses = self.draw(B, n, R)
            batch = brain.pack(prompts, responses, self.args.device)
            runs = {"scoring": (lambda: brain.sequence_log_prob(self.prior, batch),
                                lambda: plain_log_prob(self.prior, prompts, responses)),
                    "reward": (lambda: brain.score_reward(self.reward_model, batch),
                               lambda: plain_reward(self.reward_model, prompts, responses)),
                    "step": (lambda: self.step(brain.sequence_log_prob, batch),
                             lambda: self.step(plain_log_prob, prompts, responses))}[stage]
        return dict(zip(LAYOUTS, runs, strict=True))

    def wait(self):
        """The time, once the device has nothing left to do."""
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, runs):
        """Median seconds of each of {name: function}; they take turns, a first one to warm up."""
        taken = {name: [] for name in runs}
        for _ in range(1 + self.args.repeats):
            for name, run in runs.items():
                start = self.wait()
                with self.autocast():
                    run()
                taken[name].append(self.wait() - start)
        return {name: statistics.median(times[1:]) for name, times in taken.items()}

    @functools.cached_property
    def rates(self):
        """The device's bf16 FLOP a second and bytes a second, as a product and a copy show them."""
        x = torch.randn(8192, 8192, device=self.args.device, dtype=torch.bfloat16)
        took = self.seconds({"product": lambda: [x @ x for _ in range(50)],
                             "copy": lambda: [x.clone() for _ in range(50)]})
        return 50 * 2 * 8192**3 / took["product"], 50 * 4 * 8192**2 / took["copy"]

    def compare(self, stage, B, n):
        """One row of the table: both layouts in turn."""
        P, R = self.args.prompt_tokens, self.args.response_tokens
        took, tokens, note = self.seconds(self.race(stage, B, n)), B * (P + n * R), ""
        row = {"stage": stage, "n": n, "prompts": B,
               "ratio": took["plain"] / took["packed"], "limit": B * n * (P + R) / tokens}
        for layout in LAYOUTS:
            row |= {f"seconds_{layout}": took[layout],
                    f"tokens_per_second_{layout}": B * n * R / took[layout]}
        if self.args.device == "cuda" and stage == "step":
            row["mfu"] = 6 * self.parameters * tokens / took["packed"] / self.rates[0]
            note = f"MFU {row['mfu']:.0%}"
        elif self.args.device == "cuda" and stage == "sampling":  # weights and cache, bf16, a token
            cache = 2 * self.args.layers * self.args.hidden * B * (P + n * R / 2)
            row["bandwidth"] = 2 * R * (self.parameters + cache) / took["packed"] / self.rates[1]
            note = f"{row['bandwidth']:.0%} of the bandwidth"
        print(ROW(stage, n, B, *(f"{row[f'seconds_{layout}']:.3f}" for layout in LAYOUTS),
                  *(f"{row[f'tokens_per_second_{layout}']:.0f}" for layout in LAYOUTS),
                  f"{row['ratio']:.2f}", f"{row['limit']:.2f}", note), flush=True)
        return row

    def agreement(self, n):
        """Difference of log-probabilities (nats) and, relative, of gradients; fp32."""
        sides = [run() for run in self.race("step", 1, n).values()]
        (packed, g), (plain, h) = (
            (log_p, torch.cat([part.flatten() for part in gradient])) for log_p, gradient in sides)
        return (packed - plain).abs().max().item(), ((g - h).norm() / h.norm()).item()

    def bytes_used(self, peak=False):
        """Device memory in use now, or at its highest; on a CPU this process's."""
        if self.args.device == "cuda":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        field = "VmHWM" if peak else "VmRSS"
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", STATUS.read_text())[1])

    def peak_memory(self, layout, n):
        """Bytes that a step needs beyond the weights, gradients included; wants a fresh process."""
        run = self.race("step", self.args.micro_batch, n)[layout]
        with self.autocast():
            with torch.no_grad():  # loads the libraries
                self.policy(torch.zeros(1, 8, dtype=torch.long, device=self.args.device))
            before = self.bytes_used()
            run()
        return self.bytes_used(peak=True) - before


def straight(line):
    """Slope and intercept of the least-squares line, and the largest relative distance from it."""
    slope, intercept = statistics.linear_regression(list(line), list(line.values()))
    far = max(abs(y / (intercept + slope * x) - 1) for x, y in line.items())
    return {"slope": slope, "intercept": intercept, "off_by": far}


def benchmark(argv):
    """Prints the tables, and one JSON object as the last line."""
    transformers.logging.set_verbosity_error()
    args, memory = parse_bench(argv), []
    torch.set_num_threads(args.threads)
    if args.peak:
        return print(Bench(args).peak_memory(args.peak[0], int(args.peak[1])))
    if args.device == "cuda" or STATUS.exists():  # before this process takes any
        command = [sys.executable, __file__, "bench", *argv, "--peak"]
        for n in args.samples:
            row = {layout: int(subprocess.check_output([*command, layout, str(n)]))
                   for layout in LAYOUTS}
            memory.append({"n": n, **row, "ratio": row["packed"] / row["plain"]})
    bench = Bench(args)
    print(f"{bench.parameters / 1e6:.1f}M parameters, P {args.prompt_tokens}, R "
          f"{args.response_tokens}, {bench.name}, {args.threads} threads, {args.repeats} repeats\n")
    gaps = [bench.agreement(n) for n in args.samples]
    print(ROW("", "", "", "seconds", "", "tokens/s", "", "", "", ""))
    print(ROW("", "n", "prompts", *LAYOUTS, *LAYOUTS, "ratio", "limit", ""))
    rows = []
    for stage in ("sampling", "scoring", "reward", "step"):
        B = args.prompts if stage == "sampling" else args.micro_batch
        with torch.set_grad_enabled(stage == "step"):
            rows += [bench.compare(stage, B, n) for n in args.samples]
    print("\nPeak memory of a step beyond the weights, MB")
    for row in memory:
        print(f"  n {row['n']:3}: packed {row['packed'] / 1e6:.0f}, "
              f"plain {row['plain'] / 1e6:.0f}, ratio {row['ratio']:.2f}")
    n = args.samples[len(args.samples) // 2]
    packed = {B: bench.race("step", B, n)["packed"] for B in (1, 2, 4, 8)}
    lines = {"n": {row["n"]: row["seconds_packed"] for row in rows if row["stage"] == "step"},
             f"prompts at n {n}": bench.seconds(packed)}
    fits = {}
    print("\nSeconds of a packed step against")
    for what, line in lines.items():
        print(f"  {what}: " + ", ".join(f"{x}: {y:.3f}" for x, y in line.items()))
        if len(line) > 1:
            fits[what] = straight(line)
            print("    {intercept:.3f} + {slope:.4f} each, off by {off_by:.0%} at most".format(
                **fits[what]))
    log_p, gradient = map(max, zip(*gaps, strict=True))
    print(f"\nBetween the layouts: log-probabilities {log_p:.1e} nats, gradients {gradient:.1e}")
    print(json.dumps({"device": bench.name, "parameters": bench.parameters, "flags": vars(args),
                      "rows": rows, "memory": memory, "step_seconds": lines, "fits": fits,
                      "log_prob_gap": log_p, "gradient_gap": gradient}))


# ---- A whole step against TRL's: `python test_brain.py trl`, where TRL 1.16 is installed ---------
def letter_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """A character a token, so that texts survive being joined, decoded and encoded again."""
    vocabulary = {chr(0x4E00 + i): i for i in range(size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=chr(0x4E00), pad_token=chr(0x4E01))


class BothSteps(transformers.TrainerCallback):
    """Takes a step of brain.py after each of TRL's, and times both."""

    def __init__(self, args, prompts):
        self.bench, self.prompts, self.args = Bench(args), prompts, args
        self.bench.policy.config.eos_token_id = self.bench.prior.config.eos_token_id = 0
        self.bench.reward_model.config.pad_token_id = 1  # TRL's; brain.py needs none
        self.optimizer = torch.optim.AdamW(self.bench.policy.parameters(), lr=1e-6, eps=1e-5)
        self.trl, self.brain, self.tokens = [], [], []

    def step(self):
        """Stage 3 on a refresh of one step: sample, score, weigh, step."""
        bench, n = self.bench, self.args.samples[0]
        with torch.no_grad():
            responses, _ = brain.sample(bench.policy, self.prompts, n, self.args.response_tokens,
                                        eos_id=0)
            batch = brain.pack(self.prompts, responses)
            reward = brain.score_reward(bench.reward_model, batch)
            proposal, prior = (brain.sequence_log_prob(model, batch)
                               for model in (bench.policy, bench.prior))
        policy = brain.sequence_log_prob(bench.policy, batch)
        brain.brain_loss(policy, prior, proposal, reward, 0.5)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(bench.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens.append(batch.length.float().mean().item())

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        middle = time.perf_counter()
        self.step()
        self.trl.append(middle - self.began)
        self.brain.append(time.perf_counter() - middle)
        print(f"TRL {self.trl[-1]:.2f} s, brain.py {self.brain[-1]:.2f} s", flush=True)


def race_trl(argv):
    """Steps of RLOOTrainer and of brain.py in turn, on one set of random weights and prompts."""
    import datasets
    import trl
    transformers.logging.set_verbosity_error()
    args = parse_bench(argv)
    torch.set_num_threads(args.threads)
    tokenizer, n, B = letter_tokenizer(args.vocabulary), args.samples[0], args.prompts
    prompts = torch.randint(2, args.vocabulary, (B, args.prompt_tokens)).tolist()
    texts = tokenizer.batch_decode(prompts)
    assert tokenizer(texts).input_ids == prompts
    both = BothSteps(args, prompts)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("policy", both.bench.policy), ("reward", both.bench.reward_model)):
            model.save_pretrained(f"{folder}/{name}")
        trainer = trl.RLOOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/policy"),
            transformers.AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward"),
            trl.RLOOConfig(
                output_dir=folder, per_device_train_batch_size=args.micro_batch * n,
                gradient_accumulation_steps=B // args.micro_batch, num_generations=n,
                max_completion_length=args.response_tokens, beta=0.5, bf16=False,
                use_cpu=True, gradient_checkpointing=False, disable_dropout=True,
                max_steps=1 + args.repeats, learning_rate=1e-6, report_to="none",
                save_strategy="no", disable_tqdm=True),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * (1 + args.repeats)}),
            processing_class=tokenizer, reward_processing_classes=[tokenizer], callbacks=[both])
        trainer.remove_callback(transformers.PrinterCallback)
        assert trainer.ref_model is not None, "the prior is scored, too"
        trainer.train()
    median = {name: statistics.median(took[1:])  # the first is to warm up
              for name, took in (("trl", both.trl), ("brain", both.brain))}
    print(json.dumps({"trl_version": trl.__version__, "seconds": median,
                      "ratio": median["trl"] / median["brain"],
                      "mean_response_tokens": statistics.mean(both.tokens), "flags": vars(args)}))


# ---- The ablation: `python test_brain.py ablation` (README, "The dials, measured") ---------------

SAMPLES = 128  # responses a step, the same in every cell
CELLS = [("baseline", dict(baseline=baseline, proposal=proposal, samples_per_prompt=n))
         for proposal in ("lagged", "prior") for n in (2, 8, 32)
         for baseline in ("none", "unnormalized", "self_normalized")]
CELLS += [("DPO-sft", dict(target="argmax", proposal="prior", samples_per_prompt=2)),
          ("argmax", dict(target="argmax", samples_per_prompt=8)),
          ("reverse", dict(divergence="reverse", samples_per_prompt=8))]


def ablation(seeds: int, steps: int) -> list[dict]:
    """Trains every cell for every seed on toy; prior, reward model and enumeration are shared."""
    enumerate_posterior, shared, rows = brain.enumerate_posterior, {}, []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        for seed in range(seeds):
            first = [f"--seed={seed}", f"--steps={steps}", "--eval_prompts=64"]
            given = [f"--prior={folder}/{seed}/prior", f"--reward={folder}/{seed}/reward"]
            assert brain.main([*first, "--steps=4", f"--out={folder}/{seed}"]) == 0
            shared.clear()  # one enumeration a seed, of four prompts
            brain.enumerate_posterior = lambda run, models, held: shared.get("exact") or (
                shared.setdefault("exact", enumerate_posterior(run, models, held[:4])))
            for i, (name, dials) in enumerate(CELLS):
                prompts = SAMPLES // dials["samples_per_prompt"]
                sizes = [f"--prompts_per_step={prompts}", f"--prompts_per_refresh={4 * prompts}"]
                flags = [f"--{key}={value}" for key, value in dials.items()]
                out = f"--out={folder}/{seed}-{i}"
                assert brain.main([*first, *given, *sizes, *flags, out]) == 0
                last = json.loads(said.getvalue().splitlines()[-1])
                rows.append({"name": name, **dials, "seed": seed, "start":
                             last["kl_to_posterior_start"], "end": last["kl_to_posterior_end"]})
                print(json.dumps(rows[-1]), file=sys.stderr)
    brain.enumerate_posterior = enumerate_posterior
    return rows


def gradient_errors(n: int, baseline: str, log_p: Tensor, log_q: Tensor, log_proposal: Tensor,
                    draws: int, seed: int = 0) -> dict[str, float]:
    """Bias, standard deviation and root mean squared error of an estimator's gradient in the
    logits over Y, as norms over that of the true KL gradient, policy − posterior; all (|Y|,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(log_proposal.exp(), draws * n, True, generator=generator).view(draws, n)
    logits = log_q[y].requires_grad_()
    reward = (log_p - log_proposal)[y]  # so that α̂ = softmax(log_p − log_proposal), kl_coef 1
    proposal = log_proposal[y]
    loss, _ = brain.brain_loss(logits, proposal, proposal, reward, 1.0, baseline=baseline)
    c = torch.autograd.grad(loss.sum(), logits)[0]  # dloss / dlog q(y_i); log q = z − logsumexp z
    policy, total = log_q.exp(), c.sum(-1, keepdim=True)
    mean = torch.zeros_like(policy).index_add(0, y.flatten(), c.flatten()) / draws
    mean -= policy * total.mean()
    # |g|² of g = Σᵢ cᵢ (e_yᵢ − policy): equal samples of a draw add up
    same = (y[:, :, None] == y[:, None]).double()
    square = torch.einsum("di,dij,dj->d", c, same, c) - 2 * total[:, 0] * (c * policy[y]).sum(-1)
    square += total[:, 0] ** 2 * policy.square().sum()
    truth = policy - log_p.exp()
    variance = square.mean() - mean.square().sum()
    bias = (mean - truth).square().sum() - variance / draws  # the mean's own noise taken off
    parts = {"bias": bias.clamp(min=0), "sd": variance, "rmse": bias.clamp(min=0) + variance}
    return {name: (part.sqrt() / truth.norm()).item() for name, part in parts.items()}


def estimator_table(draws: int = 20_000) -> dict:
    """gradient_errors on 500 responses, with a posterior some way from the prior."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 500, dtype=torch.float64, generator=generator)
    log_prior = (1.5 * noise[0]).log_softmax(-1)
    log_p = (log_prior + 1.4 * noise[1]).log_softmax(-1)  # the posterior
    log_q = ((log_prior + log_p) / 2 + 0.3 * noise[2]).log_softmax(-1)  # a policy half way
    return {(name, n, baseline): gradient_errors(n, baseline, log_p, log_q, proposal, draws)
            for name, proposal in (("policy", log_q), ("prior", log_prior)) for n in (2, 8, 32)
            for baseline in ("none", "unnormalized", "self_normalized")}


def print_ablation(argv: list[str]) -> None:
    """Both tables of the ablation; the last line is a JSON object with every run."""
    parser = argparse.ArgumentParser(prog="test_brain.py ablation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    rows = ablation(args.seeds, args.steps)
    print("| cell | proposal | n | KL at the end over KL at the start (mean, lowest to highest) |")
    print("|---|---|---|---|")
    for i, (name, dials) in enumerate(CELLS):
        left = [row["end"] / row["start"] for row in rows[i :: len(CELLS)]]
        title = dials["baseline"] if name == "baseline" else name
        print(f"| {title} | {dials.get('proposal', 'lagged')} | {dials['samples_per_prompt']} | "
              f"{sum(left) / len(left):.3f} ({min(left):.3f} to {max(left):.3f}) |")
    print("\n| proposal | n | baseline | bias | s.d. | root mean squared error |")
    print("|---|---|---|---|---|---|")
    for (proposal, n, baseline), found in estimator_table().items():
        print(f"| {proposal} | {n} | {baseline} | {found['bias']:.3f} | {found['sd']:.3f} | "
              f"{found['rmse']:.3f} |")
    print(json.dumps(rows))


PROGRAMS = {"bench": benchmark, "trl": race_trl, "ablation": print_ablation}


def test_benchmark_runs():
    """Catches a benchmark that nobody can repeat: its processes, its tables, its last line."""
    sizes = ("--hidden 16 --layers 1 --heads 2 --vocabulary 64 --prompt_tokens 9 --repeats 1 "
             "--response_tokens 5 --prompts 2 --threads 1 --device cpu --samples 2").split()
    said = subprocess.run([sys.executable, __file__, "bench", *sizes], text=True,
                          capture_output=True, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    assert [row["stage"] for row in found["rows"]] == ["sampling", "scoring", "reward", "step"]
    assert all(row["ratio"] == row["seconds_plain"] / row["seconds_packed"] > 0
               and row["limit"] == 2 * 14 / 19 for row in found["rows"])
    assert found["memory"][0]["n"] == 2 and found["log_prob_gap"] < 1e-3
    assert found["gradient_gap"] < 1e-5 and len(found["step_seconds"]["prompts at n 2"]) == 4


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        PROGRAMS[sys.argv[1]](sys.argv[2:])
    else:
        sys.exit(f"python test_brain.py {'|'.join(PROGRAMS)} [--help]; the tests: make test")
