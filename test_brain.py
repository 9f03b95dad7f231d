"""Tests of brain.py, and the programs behind the README's figures. Sections, top to bottom:

    Tiny models, tokenizers and files     what the tests are made of
    Derivations                           the paper's identities (pytest -k derivation)
    The loss as code                      dtypes, shapes, errors
    Rows written out by hand              scores and rewards against one plain row each
    Families                              every causal LM type is right or refused (a program)
    The sampler                           against the exact softmax
    Data                                  each task's rows against rules written out by hand
    Downloads                             from a server on this machine
    Whole runs                            a known world, three families, four kinds of reward
    Bad input                             one line that says what and where
    Fuzzing                               a thousand broken rows of each format
    Kills, full disks, faults             the same command continues
    Statistics                            intervals that cover
    A task that can be checked            `python test_brain.py capitals FOLDER` (a program)
    The front page                        the README's commands, flags and examples
    A recipe for TRL                      the README's, where TRL is installed
    The benchmark                         one row per prompt against one per sample (a program)
    A whole step against TRL's            where TRL is installed (a program)
    The comparison                        BRAIn and its relatives, side by side (a program)
    Robustness                            what testing from outside found
    No card                               a pretend device, bf16 on the CPU, `gpu` (a program)

The tests: `make test`. The programs: `python test_brain.py bench|compare|compare_hh|families|trl
--help`.
"""

import argparse
import builtins
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
import multiprocessing
import os
import random
import re
import resource
import runpy
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import huggingface_hub
import numpy
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import brain

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)  # more cost more than they give on tensors as small as these


# ---- Tiny models, tokenizers and files -----------------------------------------------------------

EOS = "<|endoftext|>"
WORDS = """a bad be best blue can cat day do dog for good he how i in is it me my no not of on one
or red say so sun that the they to up was we what why will yes you . , ? !""".split()


def build_tokenizer(bos: bool = False, texts: list[str] | None = None,
                    size: int = 400) -> transformers.PreTrainedTokenizerFast:
    """Pythia's conventions in small: byte-level BPE, eos = bos = unk = id 0, no pad token. With
    `bos`, a <s> of its own is put before every text, as Llama's tokenizer does."""
    special = [EOS] + (["<s>"] if bos else [])
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if not texts:
        texts = [f" {a} {b}\n" for a in WORDS for b in WORDS]
        texts += ["\n\nHuman: \n\nAssistant: SUBREDDIT: r/ TITLE: POST: TL;DR:"] * 9
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>" if bos else EOS, eos_token=EOS, unk_token=EOS)


def word_tokenizer(words: list[str], letters: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A token for each word, or for each letter where texts are to survive being joined and cut;
    the first one is eos and stands for what is unknown."""
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if letters:
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        model.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=words[0])


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


def write_gz(path: Path, rows: list) -> Path:
    """Rows as a .jsonl.gz file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def say(count: int, seed) -> str:
    """A sentence of `count` words, each with its leading space."""
    chosen = random.Random(repr(seed)).choices(WORDS, k=count)
    return "".join(f" {word}" for word in chosen)


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


def lines_of(out: Path) -> list[dict]:
    """What a run's metrics.jsonl holds so far, whole lines only."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def preference(a: Tensor, b: Tensor) -> Tensor:
    """The share of pairs that a wins, ties counting half, per prompt: (P, m) and (P, k) to (P,)."""
    return (1 + (a[:, :, None] - b[:, None]).sign().mean((1, 2))) / 2


def metrics_of(out: Path, stage: str | None = None) -> list[dict]:
    """The same, all lines or those of a stage, without what may differ between equal runs."""
    free = ("seconds_", "tokens_", "peak_")
    return [{key: value for key, value in line.items() if not key.startswith(free)}
            for line in lines_of(out) if stage in (None, line["stage"])]


# ---- Derivations: float64, each identity on a second path ----------------------------------------


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


# One loss, its gradient, and what must not reach the gradient.


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("shape", [(1, 2), (4, 3), (3, 8), (2, 64)])
def test_derivation_gradient_is_alpha_hat_minus_the_baseline(baseline, shape):
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
def test_derivation_only_log_policy_carries_a_gradient(baseline, attached):
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


def test_derivation_reverse_detaches_all_but_log_policy():
    """Catches a gradient through α̂ in KL(β̂ ‖ α̂), where the leaf is prior and proposal too."""
    leaf, reward = draw(2, 3, 5, seed=4)
    leaf.requires_grad_()
    loss, _ = brain.brain_loss(leaf, leaf, leaf, reward, KL, divergence="reverse")
    advantage = reward - reward.mean(-1, keepdim=True)  # ρ = 0, β̂ = 1/n
    close(torch.autograd.grad(loss.sum(), leaf)[0], -advantage / (5 * KL))


# Zero, invariances, extremes.


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_derivation_zero_at_the_optimum_for_every_tuple(divergence, n):
    """Catches α̂ and β̂ not built alike: at policy = posterior no tuple may leave a gradient."""
    space = Enumerated(size=4, seed=9, scale=2.0)
    index, _ = space.tuples(n)
    loss, gradient = loss_and_gradient(*space.inputs(index, space.posterior), divergence=divergence)
    close(loss, torch.zeros_like(loss))
    close(gradient, torch.zeros_like(gradient))


def test_derivation_the_loss_is_bounded_below_where_it_should_be():
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
def test_derivation_finite_normalised_and_invariant(extreme, dials, shape):
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
def test_derivation_normalising_constants_cancel(position):
    """Catches a share that is not self-normalised: a constant such as log Z(x) must drop out."""
    inputs = list(draw(4, 3, 5, seed=15))
    before, gradient_before = loss_and_gradient(*inputs, KL)
    inputs[position] = inputs[position] + torch.tensor([[2.0], [-3.0], [7.0]])
    after, gradient_after = loss_and_gradient(*inputs, KL)
    close(after, before)
    close(gradient_after, gradient_before)


def test_derivation_ties_share_the_argmax():
    """Catches ties that go to the first sample alone, and kl_coef or the prior felt by argmax."""
    inputs = list(draw(4, 4, 4, seed=16))
    inputs[3] = torch.tensor([[1, 3, 3, 0], [2, 2, 2, 2], [0, 1, 5, 5], [4, 0, 1, 4]]).double()
    want = torch.tensor([[0, .5, .5, 0], [.25, .25, .25, .25], [0, 0, .5, .5], [.5, 0, 0, .5]])
    for kl_coef in (1e-3, 0.7, 1e3):
        close(brain.snis_weights(*inputs, kl_coef, "argmax").alpha_hat, want.double())


def test_derivation_argmax_is_the_limit_of_small_kl_coef():
    """Catches an argmax of something else than the reward: α̂ tends to it as kl_coef tends to 0."""
    policy, prior, proposal, reward = draw(4, 20, 5, seed=17)
    reward = reward.argsort(-1).argsort(-1).double()  # distances of 1 between the ranks
    limit, argmax = (brain.snis_weights(policy, prior, proposal, reward, 1e-2, target).alpha_hat
                     for target in ("posterior", "argmax"))
    close(argmax, limit)


# Relatives: DPO, InfoNCA, the policy gradients.


@pytest.mark.parametrize("beta", [1.0, 0.1, 2.5])
@pytest.mark.parametrize("kl_coef", [1e-3, 0.7, 50.0])
@pytest.mark.parametrize("labels", ["rewards", "one and zero"])
def test_derivation_dpo(beta, kl_coef, labels):
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
def test_derivation_infonca(n):
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
def test_derivation_ppo_has_the_same_objective(kl_coef):
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
def test_derivation_reverse_is_the_regularised_policy_gradient(n):
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
def test_derivation_reverse_on_policy_is_rloo_grpo_and_ppo(n):
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
def test_derivation_forward_meets_reverse_for_small_advantages(n, order):
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


# The whole space, and the expectation over samples.


@pytest.mark.parametrize("baseline", BASELINES)
def test_derivation_enumeration_is_the_true_kl(baseline):
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
def test_derivation_estimator_is_unbiased_for_the_finite_n_divergence(size, n):
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


def test_derivation_finite_n_divergence_is_zero_at_the_posterior_alone():
    """Catches a loss with another minimiser: D_n is 0 at policy = posterior, positive elsewhere."""
    for seed in range(20):
        space = Enumerated(4, seed=30 + seed)
        index, probability = space.tuples(3)
        at_policy, at_posterior = (probability @ brain.brain_loss(*space.inputs(index, table))[0]
                                   for table in (space.policy, space.posterior))
        assert abs(at_posterior) < 1e-13 and at_policy > 1e-3


def test_derivation_finite_n_divergence_is_not_the_true_kl():
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


def test_derivation_bias_falls_like_one_over_n():
    """Catches a bias that does not vanish, such as a normaliser off by a constant factor:
    n × the relative bias of the expected gradient tends to a constant."""
    space = Enumerated(5, seed=50)
    true = space.policy - space.posterior
    scaled = [(n * (space.expected_gradient(n) - true).norm() / true.norm()).item()
              for n in (256, 512, 1024)]
    assert max(scaled) / min(scaled) < 1.05


def test_derivation_monte_carlo_agrees_with_the_integral():
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


# The authors' experiment: posterior N(0,1), policy N(1,1), proposal N(μ,1), n = 8.


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


def test_derivation_authors_experiment():
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


def test_derivation_authors_experiment_at_the_optimum():
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
def test_derivation_brain_loss_has_the_moments_of_the_table(mu, baseline, name):
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


def test_derivation_on_policy_unnormalized_is_brain():
    """Catches an exp(ρ)/n without its 1/n: on-policy it is β̂, sample by sample."""
    one, other = (gaussian_estimates(1.0, baseline, repeats=1000, seed=61)
                  for baseline in ("unnormalized", "self_normalized"))
    close(one, other)


# The checks that brain.py itself runs.


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


# ---- The loss as code ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dials", [{"baseline": name} for name in BASELINES] + [
    {"target": "argmax"}, {"divergence": "reverse"}], ids=lambda dials: next(iter(dials.values())))
def test_loss_keeps_dtype_and_inputs(dtype, dials):
    """Catches a stray cast, a default-dtype constant, an in-place edit of the caller's tensors."""
    inputs = [x.to(dtype) for x in draw(4, 2, 6, seed=5)]
    before = [x.clone() for x in inputs]
    loss, weights = brain.brain_loss(*inputs, KL, **dials)
    assert (loss.dtype, loss.shape) == (dtype, (2,))
    for weight in weights:
        assert (weight.dtype, weight.shape) == (dtype, (2, 6))
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x, old) and x.grad is None


def test_loss_in_float32_agrees_with_float64():
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
def test_loss_refuses_bad_input(change, message):
    """Catches a dial's typing error taken for a default, and shapes that broadcast in silence."""
    arguments = dict(zip(ARGUMENTS, (*draw(4, 3, 5, seed=8), KL), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        brain.brain_loss(**arguments)


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


# ---- Rows written out by hand: real (tiny) models, scores and rewards ----------------------------

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
    """The same from one plain row, every argument left to the model: the oracle of all tests."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)[range(len(response)), response].sum()


def own_head_reward(model, prompt: list[int], response: list[int]):
    """The library's own head on one row; without a pad id it reads the row's last token."""
    assert model.config.pad_token_id is None
    return model(torch.tensor([prompt + response])).logits[0, 0]


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
            linear.weight.zero_()
            linear.bias.zero_()
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    run = SimpleNamespace(cfg=brain.Config(), device="cpu", dtype=torch.float32)
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


# ---- Families: tiny and random, each type is right or refused, never wrong -----------------------

CAUSAL = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SIZES = {name: size for size, names in {  # of whichever of these fields a config has
    1: """n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups
       first_k_dense_replace num_dense_layers decoder_sparse_step pretraining_tp mamba_n_groups
       num_mtp_layers num_nextn_predict_layers""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
       num_decoder_layers num_encoder_layers num_key_value_heads swa_num_key_value_heads
       num_experts_per_tok moe_topk moe_k linear_num_key_heads mamba_expand expand n_mamba_heads
       index_n_heads""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
       encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads rotary_dim
       linear_num_heads linear_num_value_heads swa_num_attention_heads mamba_n_heads
       mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts
       zero_expert_num state_size ssm_state_size mamba_d_state""",
    8: """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim d_head d_rel
       linear_value_head_dim swa_head_dim index_head_dim linear_head_dim kv_channels dim_head
       query_pre_attn_scalar kv_lora_rank q_lora_rank adapter_rank router_hidden_size chunk_size
       mamba_chunk_size hidden_size_per_layer_input""",
    16: "mamba_head_dim mamba_d_head moe_latent_size qk_head_dim",
    32: """hidden_size n_embd d_model emb_dim embedding_size embedding_dim word_embed_proj_dim
        input_embedding_size output_embedding_size lru_width attention_hidden_size
        dim_model_base""",
    64: """intermediate_size n_inner d_inner dff dim_ff ffn_dim decoder_ffn_dim encoder_ffn_dim
        ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size mamba_d_ssm
        prefix_dense_intermediate_size""",
    416: """vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size
         audio_vocab_size""",
    640: """max_position_embeddings n_positions n_ctx max_seq_len context_length
         original_max_position_embeddings max_source_positions max_target_positions""",
}.items() for name in names.split()} | dict(
    bos_token_id=0, eos_token_id=0, pad_token_id=0, is_decoder=True, initializer_range=0.3)
STUBBORN = {  # what else these types need to be small
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(rope_parameters={
        kind: dict(rope_type="default", rope_theta=1e4)
        for kind in ("sliding_attention", "full_attention")}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
                 ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2)),
    "dots3_note_text": dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=8, swa_v_head_dim=8,
        swa_kv_lora_rank=8, swa_head_dim=16, swa_qk_nope_head_dim=8, head_dim=16),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_head=16),
    "gemma3n_text": dict(num_kv_shared_layers=2,
                         layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hrm_text": dict(H_cycles=1, L_cycles=1),  # fp32 makes 3e-4 nats of its 2 × 3 cycles
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"]),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
                           indexer_budget=2048, indexer_compress_ratio=4, split_ngram_parts=1,
                           ngram_vocab_size_base=100),
    "reformer": dict(axial_pos_shape=(16, 40), axial_pos_embds_dim=(8, 24), attention_head_size=8,
                     attn_layers=["local", "lsh"]),
    "roc_bert": dict(pronunciation_vocab_size=64, shape_vocab_size=64, shape_embed_dim=32,
                     pronunciation_embed_dim=32),
    "xlstm": dict(chunk_size=16), "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=64,
                  attention_head_dim=16), "zaya": dict(num_experts_per_tok=1)}
WINDOWS = """sliding_window window_size attention_window_size attention_chunk_size index_topk
sliding_window_size local_attention indexer_budget index_block_size""".split()


def long_rope(kind: str, original: int, **more) -> dict:
    """A config's changes for positions that are read differently in rows over `original`."""
    rope = dict(rope_type=kind, rope_theta=1e4, original_max_position_embeddings=original,
                factor=4.0, partial_rotary_factor=1.0)
    if kind == "longrope":
        rope |= dict(short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 5.0, 7.0])
    return dict(rope_parameters=rope | more)


VARIANTS = [  # of types above: what else a config can switch on, at rows of up to 35 tokens
    *(("phi3", f"longrope over {n} tokens", long_rope("longrope", n)
       | dict(original_max_position_embeddings=n)) for n in (4, 30, 35)),
    *(("phimoe", f"longrope over {n} tokens",
       long_rope("longrope", n, short_mscale=1.0, long_mscale=1.2)) for n in (4, 30, 35)),
    *(("llama", f"dynamic NTK over {n} tokens",
       long_rope("dynamic", n) | dict(max_position_embeddings=n)) for n in (4, 30, 35)),
    ("llama", "YaRN", long_rope("yarn", 12)), ("llama", "linear RoPE", long_rope("linear", 12)),
    ("falcon", "ALiBi", dict(alibi=True)),
    ("falcon", "new decoder", dict(new_decoder_architecture=True, num_kv_heads=2)),
    ("bert", "an encoder", dict(is_decoder=False)),
    ("gpt_bigcode", "multi-head", dict(multi_query=False)),
    ("llama4_text", "tempered", dict(attn_temperature_tuning=True, floor_scale=4)),
    ("opt", "norm after", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    ("smollm3", "a layer without positions", dict(no_rope_layers=[1, 0])),
    ("stablelm", "parallel", dict(use_parallel_residual=True, qk_layernorm=True)),
    ("gemma2", "capped", dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    ("gemma3_text", "bidirectional", dict(use_bidirectional_attention=True))]


def small_config(kind: type, **changes) -> transformers.PretrainedConfig:
    """A config of class `kind` whose known sizes are small, with a layer or two of each sort."""
    names = {field.name for field in dataclasses.fields(kind)}
    usual, special = kind(), STUBBORN.get(kind.model_type, {})
    given = {name: size for name, size in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has a key for each head
        given["num_key_value_heads"] = 4
    for name in ("layer_types", "layers_block_type", "block_types"):
        if name in names and getattr(usual, name):
            sorts = list(dict.fromkeys(getattr(usual, name)))
            given[name] = sorts * (1 if len(sorts) > 1 else 2)
    given |= {name: small_config(type(part)).to_dict() for name in kind.sub_configs
              if (part := getattr(usual, name, None)) is not None}  # of text, of images
    given |= special | changes
    if layers := given.get("layer_types") or given.get("layers_block_type"):
        given["num_hidden_layers"] = len(layers)
    for name in ("mlp_layer_types", "indexer_types"):
        if name in names and getattr(usual, name):
            sorts = list(dict.fromkeys(getattr(usual, name))) * 9
            given[name] = sorts[: given["num_hidden_layers"]]
    return kind(**given)


def build_family(model_type: str, **changes):
    """A tiny causal LM of this type, each of its weights drawn, so that none hides a mistake.
    Raises whatever the type's classes raise, or ValueError if it has over 7M parameters."""
    config = small_config(transformers.CONFIG_MAPPING[model_type], **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if model.num_parameters() > 7e6:
        raise ValueError(f"{model.num_parameters() / 1e6:.0f}M parameters, not tiny")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.3 * noise if weight.ndim > 1 else weight.nan_to_num() + 0.1 * noise)
    return model


def narrow(model_type: str, window: int) -> dict:
    """The changes that make this type's windows so many tokens; empty if it has none."""
    kind = transformers.CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(kind)}
    changes = {name: window for name in WINDOWS if name in names}
    if "sliding_window" in changes:
        layers = set(getattr(small_config(kind), "layer_types", None) or [])
        if layers == {"full_attention"}:  # windows are an option here: switch it on
            changes["layer_types"] = ["sliding_attention", "full_attention"]
        changes |= {"use_sliding_window": True} if "use_sliding_window" in names else {}
    return changes


class Verdict(NamedTuple):
    """What a family is: "right", "refused" or "wrong"; a gap in nats; and why it is refused."""
    word: str
    gap: float
    why: str = ""


@torch.no_grad()
def family_verdict(model_type: str, counts=(1, 2, 4, 8), P: int = 23, R: int = 12,
                   **changes) -> Verdict:
    """A family at these n up to 8, scores and samples against single rows of an untouched copy.
    A run of n whose start check passes may go wrong at no n up to its own."""
    model, lengths = build_family(model_type, **changes), (R, 3, 1, 7, 10, 5, R, 2)
    row_model, prompts = copy.deepcopy(model), [draw_ids(P, 3), draw_ids(1, 4), draw_ids(9, 5)]
    responses = [[draw_ids(lengths[(i + b) % 8] - (i % 3 == 1), 100 * b + i) + [0] * (i % 3 == 1)
                  for i in range(8)] for b in range(3)]  # some end in eos
    rows, gaps, refusals = table_of(plain_score, row_model, prompts, responses), {}, {}
    for n in counts:
        try:
            run = SimpleNamespace(max_prompt_tokens=P, samples_per_prompt=n, eval_samples=1)
            brain.check_model(run, copy.deepcopy(model), R)
        except brain.Stop as stop:
            refusals[n] = str(stop)
        except Exception as error:
            return Verdict("wrong", math.inf, f"the start check raises {type(error).__name__}")
        try:
            batch = brain.pack(prompts, [ys[:n] for ys in responses])
            scores = brain.sequence_log_prob(model, batch) - rows[:, :n]
            ids, log_q = brain.sample(model, prompts, n, 4, eos_id=0, generator=[
                torch.Generator().manual_seed(b) for b in range(3)])
            samples = log_q - table_of(plain_score, row_model, prompts, ids)
            gaps[n] = torch.cat([scores, samples]).abs().nan_to_num(math.inf).max().item()
        except Exception:
            gaps[n] = math.inf
    passed = [max(gap for m, gap in gaps.items() if m <= n) for n in gaps if n not in refusals]
    if passed and not max(passed) <= 1e-4:
        return Verdict("wrong", max(passed))
    if counts[-1] in refusals:
        return Verdict("refused", gaps[counts[-1]], refusals[counts[-1]])
    return Verdict("right", max(passed))


def families(argv: list[str]) -> None:
    """A line for each type and variant; the last line is a JSON object with the counts."""
    parser = argparse.ArgumentParser(prog="test_brain.py families")
    parser.add_argument("types", nargs="*", help="all causal LM types by default")
    types, start = parser.parse_args(argv).types or list(CAUSAL), time.perf_counter()
    transformers.logging.set_verbosity_error()
    found, counts = {}, collections.Counter()

    def judge(name: str, model_type: str, changes: dict) -> None:
        try:
            found[name] = family_verdict(model_type, **changes)
        except Exception as error:  # of the builder, or of a plain row
            reason = str(error).strip().partition("\n")[0][:100]
            found[name] = Verdict("not built", math.nan, f"{type(error).__name__}: {reason}")
        gap = f"{found[name].gap:.1e} nats " if found[name].word in ("right", "wrong") else ""
        print(f"| {name} | {found[name].word} | {gap}{found[name].why} |", flush=True)

    print("| type | verdict | largest gap, or why |\n|---|---|---|")
    for model_type in types:
        judge(model_type, model_type, {})
        counts[found[model_type].word] += 1
    for model_type in types:
        if found[model_type].word == "right" and narrow(model_type, 16):
            for window in (16, 48, 100):  # shorter than the row; than 4 branches; than 8
                judge(f"{model_type}, window {window}", model_type, narrow(model_type, window))
    for model_type, what, changes in VARIANTS:
        if model_type in types:
            judge(f"{model_type}, {what}", model_type, changes)
    variants = collections.Counter(f"variants {v.word}" for v in found.values())
    variants.subtract({f"variants {word}": count for word, count in counts.items()})
    print(json.dumps({word: 0 for word in ("right", "refused", "wrong", "not built")} | counts
                     | variants | {
        "largest gap": max((v.gap for v in found.values() if v.word == "right"), default=None),
        "wrong ones": [name for name, v in found.items() if v.word == "wrong"],
        "seconds": round(time.perf_counter() - start, 1)}))


@pytest.mark.parametrize("model_type, changes, word", [
    ("gpt_neo", dict(window_size=100), "refused"),  # wide enough for scores, not for 8 samples
    ("gemma3_text", dict(sliding_window=16), "refused"), ("gptj", {}, "right"),
    ("opt", {}, "right"), ("bloom", {}, "refused"), ("mamba", {}, "refused"),
    ("phi3", VARIANTS[1][2], "refused"), ("qwen3", {}, "right"), ("olmo2", {}, "right"),
    ("falcon", {}, "right"), ("mllama", {}, "right")])  # the last has ids without logits
def test_family_is_right_or_refused(model_type, changes, word):
    """Catches a layout that only the three families above can read (ten do here, the rest in
    `test_brain.py families`), and a start check that lets a type through whose windows count
    columns, whose positions depend on the batch, which has ALiBi or a recurrent state, or that
    fails with more than a line that names the type."""
    found = family_verdict(model_type, counts=(1, 8), **changes)
    assert found.word == word, found
    if word == "refused":
        assert model_type in found.why and "\n" not in found.why


# ---- The sampler against the exact softmax: counts, cell by cell, with exact binomial tails ------

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
        assert_counts(collections.Counter(drawn), exact_probabilities(model, prompt, 3, 0.8), 4096)


def test_branches_and_prompts_are_drawn_independently(five_tokens):
    """Catches uniforms that branches or prompts share: the first ids of two branches of one prompt,
    and of one branch of two prompts, are jointly distributed as the product, false alarm 2e-7."""
    model, prompts, responses, _ = five_tokens
    one = [exact_probabilities(model, prompt, 1, 0.8) for prompt in prompts]
    product = {(*a, *b): one[0][a] * one[0][b] for a in one[0] for b in one[0]}
    of_branches = [(ys[i][0], ys[i + 1][0]) for ys in responses[::2] for i in range(0, 32, 2)]
    assert_counts(collections.Counter(of_branches), product, 2048)
    product = {(*a, *b): one[0][a] * one[1][b] for a in one[0] for b in one[1]}
    of_prompts = [(responses[b][i][0], responses[b + 1][i][0]) for b in range(0, 256, 2)
                  for i in range(32)]
    assert_counts(collections.Counter(of_prompts), product, 4096)


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
        beyond = collections.Counter(r >= first for r in ranks)
        assert_counts(beyond, {True: share, False: 1 - share}, 2048)


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


# ---- Data ----------------------------------------------------------------------------------------


def config_of(*argv) -> brain.Config:
    """A configuration as the command line gives it."""
    return brain.parse_config([str(word) for word in argv])


def make_post(i: int, lines: list[str], **changes) -> dict:
    """A row of tldr_3_filtered; `summary` has no leading space there."""
    return {"id": f"t3_{i}", "subreddit": "AskDogs", "title": f"My dog, part {i}",
            "post": "\n".join(lines), "summary": say(6, f"summary {i}").strip(), **changes}


POSTS = {
    "train": [
        make_post(0, [say(30, 0).strip(), say(9, 1)]),
        make_post(1, [say(60, f"line {k}") for k in range(20)]),  # too long
        make_post(2, [say(560, 2)]),  # too long
        make_post(3, ["", say(40, 3), "", "", say(380, 3), ""]),  # not too long
        make_post(4, ["Größe: 3 € – ‘naïve’ 犬と猫 🐕", say(12, 4)], title="Ünï “日本”"),
        *(make_post(i, [say(15 + i, i)]) for i in range(5, 24))],
    "test": [make_post(100 + i, [say(30, f"held out {i}")]) for i in range(7)]
            + [make_post(107, [say(70, f"long {k}") for k in range(15)])],
}
def write_tldr(folder: Path, **posts: list) -> Path:
    """OpenAI's layout: the posts of each split."""
    for split, rows in posts.items():
        write_lines(folder / f"datasets/tldr_3_filtered/{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def tldr_dir(tmp_path_factory):
    """POSTS, as files."""
    return write_tldr(tmp_path_factory.mktemp("tldr"), **POSTS)


def openai_query(row: dict) -> str:
    """The published template."""
    return (f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}"
            "\n\nTL;DR:")


def expected_tldr(tokenizer, split: str, limit: int) -> list[tuple]:
    """(prompt, reference) of the files of `tldr_dir` that are not too long, in their order."""
    rows = [(openai_query(row), " " + row["summary"]) for row in POSTS[split]]
    return [row for row in rows if len(tokenizer(row[0]).input_ids) <= limit]


@pytest.mark.parametrize("split", ["train", "test"])
def test_tldr_rows_follow_the_published_rules(split, tldr_dir, tmp_path, capsys):
    """Catches long posts let in, a wrong template or trailing space, a doubled or missing
    leading space, splits mixed up, and empty summaries let in or not counted."""
    tokenizer, folder = build_tokenizer(), tldr_dir
    if split == "train":  # an empty summary stands last
        folder = write_tldr(tmp_path, train=[*POSTS["train"], make_post(24, ["x"], summary=" ")])
    cfg = config_of("--task", "tldr", "--prior", "p", "--reward", "r", "--data_dir", folder)
    examples = brain.load_task(cfg, split, tokenizer)
    expected = expected_tldr(tokenizer, split, 512)
    assert [tuple(e) for e in examples] == [(*row, None, None) for row in expected]
    rows = len(POSTS[split]) + (split == "train")
    assert f"{len(expected)} of {rows} rows" in capsys.readouterr().out
    assert len(expected) == len(POSTS[split]) - {"train": 2, "test": 1}[split]
    if split == "train":
        lengths = [len(tokenizer(e.prompt).input_ids) for e in examples]
        assert 400 < lengths[1] <= 512 and "犬と猫 🐕" in examples[2].prompt


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
    assert "6 of 11 rows" in capsys.readouterr().out


def test_bos_stands_once_before_prompts_and_never_in_responses():
    """Catches BOS added twice, or to responses, a missing or doubled end-of-text, and an
    end-of-text on a response that was cut."""
    llama, neox = build_tokenizer(bos=True), build_tokenizer()
    for tokenizer, start in [(llama, [1]), (neox, [])]:
        plain = tokenizer(" the cat can run .", add_special_tokens=False).input_ids
        assert 0 not in plain and 1 not in plain
        texts = [" the cat can run ."]
        run = SimpleNamespace(tokenizer=tokenizer, device="cpu", cfg=brain.Config())
        with recorded("pack") as calls:
            brain.text_batches(run, [brain.Example(*texts * 2)], ["reference"], len(plain) + 1)
        assert calls[0][0][:2] == ([start + plain], [[plain + [0]]])
        assert brain.encode_responses(tokenizer, texts, len(plain) + 1) == [plain + [0]]
        assert brain.encode_responses(tokenizer, texts, len(plain)) == [plain]
        assert brain.encode_responses(tokenizer, texts, 2) == [plain[:2]]


# ---- Downloads -----------------------------------------------------------------------------------


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
        self.wfile.write(whole[first : self.server.short] if body is None else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def file_server():
    """The server; its address is in `url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.requests, server.short = {}, [], None
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("task", ["hh", "tldr"])
def test_absent_files_are_fetched(task, file_server, tmp_path, monkeypatch, capsys):
    """Catches a download that appends to what an earlier one left, that keeps the temporary name,
    that is cut short, that is not announced, or that is made again."""
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
    file_server.short = 500  # and at first this one's answer ends before its time, six times
    cfg = config_of("--task", task, "--prior", "p", "--reward", "r", "--data_dir", tmp_path,
                    *(["--hh_subsets", "harmless-base"] if task == "hh" else []))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(brain.Stop, match="cannot be fetched"):
        brain.load_task(cfg, "train", build_tokenizer())
    assert not (tmp_path / name).exists()
    file_server.short = None
    examples = brain.load_task(cfg, "train", build_tokenizer())
    printed = capsys.readouterr().out
    assert len(examples) == len(rows) and (tmp_path / name).read_bytes() == whole
    assert not part.exists()
    assert f"fetching {file_server.url}/{name} to {tmp_path / name}" in printed
    before = len(file_server.requests)
    assert brain.load_task(cfg, "train", build_tokenizer()) == examples
    assert len(file_server.requests) == before


# ---- Whole runs, in this process -----------------------------------------------------------------


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
        """metrics_of its folder."""
        return metrics_of(self.folder, stage)

    def samples(self, model: str) -> list[dict]:
        """The lines of samples.jsonl of prior or policy."""
        lines = map(json.loads, (self.folder / "samples.jsonl").read_text().splitlines())
        return [line for line in lines if line["model"] == model]


SHORT = dict(device="cpu", steps=4, samples_per_prompt=4, prompts_per_step=4,
             prompts_per_refresh=8, max_prompt_tokens=64, max_response_tokens=12,
             max_comparison_tokens=16, eval_prompts=8, eval_samples=2, lr=1e-3)


def finish(argv: list[str], out: Path) -> Finished:
    """brain.main of a command line for this folder, in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = brain.main([*argv, "--out", str(out)])
    return Finished(status, stdout.getvalue(), stderr.getvalue(), out)


def launch(out: Path, **flags) -> Finished:
    """A run with these flags over those of SHORT."""
    argv = []
    for name, value in {**SHORT, **flags}.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return finish(argv, out)


RESULT_KEYS = set(
    "task steps seconds reward_prior reward_policy win_rate_vs_prior win_rate_vs_prior_ci "
    "kl_to_prior kl_to_prior_se eos_share response_tokens".split())


def assert_complete(run: Finished, task: str, temperature: float = 1.0) -> None:
    """The run ended well, and its policy loads as any other model, samples what was trained, and
    generates."""
    result = run.result()
    saved = json.loads((run.folder / "result.json").read_text())
    assert saved["config"]["task"] == task and result.items() <= saved.items()
    assert result.keys() >= RESULT_KEYS
    assert result["task"] == task and result["steps"] == 4
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
    """Two steps per refresh: the policy's shares are exactly equal in the first, and not in the
    second; n is 4 or 32, so 1/n is exact."""
    n = round(lines[0]["ess_beta"])
    for turn, line in enumerate(lines):
        assert (line["ess_beta"] == n) == (turn % 2 == 0), (turn, line["ess_beta"])


# A world small enough to know everything of it: 5 ids, at most 3 in a response, 85 responses.
# Four seeds end at a KL of 0.15 to 0.16 from 0.72; at twice the rate half of them lose a prompt.
WORLD = dict(task="jsonl", max_prompt_tokens=8, max_response_tokens=3, max_comparison_tokens=3,
             samples_per_prompt=32, prompts_per_step=8, prompts_per_refresh=16, steps=40, lr=7.5e-4,
             kl_coef=0.2, temperature=0.8, eval_prompts=16, eval_samples=256)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory):
    """Prior, reward model and 16 rows of the world, prompts of 1 to 4 words, for both splits."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = word_tokenizer([EOS, *"abcd"])
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


class Watched(NamedTuple):
    """A run in the world, and the calls of brain's functions: (arguments, result) each."""

    run: Finished
    losses: list  # of brain_loss, one a step
    samples: list  # of sample_batches
    exact: list  # of exact_kl


@pytest.fixture(scope="module")
def world(world_dir, tmp_path_factory):
    """A run in the world, watched."""
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(recorded(name))
                 for name in ("brain_loss", "sample_batches", "exact_kl")]
        return Watched(world_run(world_dir, tmp_path_factory.mktemp("run") / "world"), *calls)


class Known(NamedTuple):
    """All 85 responses to the 16 test prompts, each (16, 85), by plain rows."""

    prompts: list[str]
    log_prior: torch.Tensor
    log_policy: torch.Tensor
    reward: torch.Tensor
    ended: torch.Tensor
    tokens: torch.Tensor


@pytest.fixture(scope="module")
def known(world, world_dir):
    """Exact figures of the finished run's models, read from its folder."""
    run = world.run
    run.result()
    kind = transformers.AutoModelForCausalLM.from_pretrained
    prior, policy = kind(world_dir / "prior").eval(), kind(run.folder / "policy").eval()
    reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(
        world_dir / "reward").eval()
    space, prompts, table = response_space(5, 3), [], []
    penalty = json.loads((run.folder / "config.json").read_text())["missing_eos_penalty"]
    assert penalty > 0
    with torch.no_grad():
        for line in (world_dir / "test.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompts.append(row["prompt"])
            x = [" abcd".index(word) for word in row["prompt"].split()]
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
            table.append(torch.cat(columns, -1))
    return Known(prompts, *torch.stack(table, 1))


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
    to a third (measured: a fifth), and what the run printed is that, of the prompts it listed."""
    log_posterior = (known.log_prior + known.reward / 0.2).log_softmax(-1)
    start, end = ((log_posterior.exp() * (log_posterior - log_q)).sum(-1)  # (16,)
                  for log_q in (known.log_prior, known.log_policy))
    assert start.mean() > 0.5 and end.mean() < start.mean() / 3
    (_, _, batches), last = world.exact[-1]
    listed = [known.prompts.index(e.prompt) for batch in batches for e in batch.examples]
    result = world.run.result()
    assert len(listed) == 8 and result["kl_to_posterior_end"] == round(last, 6)
    assert abs(result["kl_to_posterior_start"] - start[listed].mean()) < 1e-3
    assert abs(result["kl_to_posterior_end"] - end[listed].mean()) < 1e-3
    seen = [line["kl_to_posterior"] for line in world.run.metrics() if "kl_to_posterior" in line]
    assert 5 <= len(seen) <= 7 and seen[0] == pytest.approx(start[listed].mean().item(), abs=1e-3)


def test_evaluation_estimates_the_exact_figures(world, known):
    """Catches a KL of the wrong sign or over old samples, a penalty that is not everywhere, a
    temperature that is not, figures of prior and policy swapped, and lengths without end-of-text;
    false alarm 6e-7."""
    result, ratio = world.run.result(), known.log_policy - known.log_prior
    assert_mean(result["reward_prior"], known.log_prior, known.reward, 256)
    assert_mean(result["reward_policy"], known.log_policy, known.reward, 256)
    assert_mean(result["kl_to_prior"], known.log_policy, ratio, 256)
    assert_mean(result["eos_share"], known.log_policy, known.ended, 256)
    assert_mean(result["response_tokens"], known.log_policy, known.tokens, 256)
    assert result["kl_to_prior"] > 0.2  # far enough for its sign to show
    assert result["reward_policy"] > result["reward_prior"] + 0.1


def test_win_rates_are_those_of_all_pairs(world, known):
    """Catches ties that count as wins or as losses, and sides swapped. Hoeffding's inequality over
    16 × 256 disjoint pairs: false alarm 2e-7."""
    result, allowed = world.run.result(), math.sqrt(math.log(2e7) / (2 * 16 * 256))
    p, q, r = known.log_prior.exp(), known.log_policy.exp(), known.reward
    gap = r[:, :, None] - r[:, None]  # (16, 85, 85): policy's against prior's
    tie = gap.abs() < 1e-4
    pair = q[:, :, None] * p[:, None]
    ties = (pair * tie).sum((1, 2)).mean().item()
    exact = (pair * ((gap > 0) & ~tie)).sum((1, 2)).mean().item() + ties / 2
    assert ties / 2 > allowed  # so that counting them wrongly shows
    assert abs(result["win_rate_vs_prior"] - exact) < allowed


def test_the_posterior_is_the_best_there_is(world, known):
    """Catches weights of another penalty or kl_coef: at every prompt the posterior's objective is
    above the policy's, which comes near to what the posterior itself would win."""
    p, r = known.log_prior.exp(), known.reward
    log_posterior = (known.log_prior + r / 0.2).log_softmax(-1)  # (16, 85)
    gap = r[:, :, None] - r[:, None]  # (16, 85, 85): a policy's against the prior's
    wins = (p[:, None] * ((gap > 1e-4).double() + (gap.abs() <= 1e-4).double() / 2)).sum(-1)
    rate, objective = {}, {}
    for name, log_q in (("posterior", log_posterior), ("policy", known.log_policy)):
        q = log_q.exp()
        rate[name] = (q * wins).sum(-1).mean().item()
        objective[name] = (q * (r - 0.2 * (log_q - known.log_prior))).sum(-1)  # (16,)
    print(f"\nwin rates against the prior: {rate}")
    assert (objective["posterior"] > objective["policy"]).all()
    assert 0.55 < rate["policy"] and rate["policy"] - 0.5 > 0.7 * (rate["posterior"] - 0.5)


def test_proposal_is_frozen_between_refreshes(world):
    """Catches a proposal that follows the policy at each step, one that is never refreshed, and
    samples whose scores belong to others. Relies on brain_loss being called once a step."""
    assert_frozen_between_refreshes(world.run.metrics("brain"))
    assert len(world.losses) == 40
    for step, (tensors, _) in enumerate(world.losses):
        log_policy, log_prior, log_proposal, reward = tensors[:4]
        assert log_policy.shape == reward.shape == (8, 32)
        assert torch.equal(log_policy, log_proposal) == (step % 2 == 0)
        assert torch.equal(log_proposal, log_prior) == (step < 2)


def test_metrics_are_those_of_the_tensors(world):
    """Catches a KL of the wrong sign, ESS of the wrong weights, and a loss that is not the mean
    over the step's prompts."""
    calls = [tensors for tensors, _ in world.losses]
    for line, args in zip(world.run.metrics("brain"), calls, strict=True):
        q, p, q1, r = (tensor.detach().double() for tensor in args[:4])
        alpha = (p + r / 0.2 - q1).exp()
        beta, alpha = (q - q1).exp(), alpha / alpha.sum(-1, keepdim=True)
        beta = beta / beta.sum(-1, keepdim=True)
        expected = {
            "loss": (alpha * (alpha / beta).log()).sum(-1), "reward": r,
            "reward_spread": r.std(-1) / 0.2,
            "ess_alpha": 1 / alpha.square().sum(-1), "ess_beta": 1 / beta.square().sum(-1),
            "kl_to_prior": (beta * (q - p)).sum(-1)}
        for name, values in expected.items():
            assert abs(line[name] - values.mean().item()) < 1e-4, (line["step"], name)
        assert line["refresh_kl"] == pytest.approx((q1 - p).mean().item(), abs=1e-4)
        assert line["refresh_kl_sd"] == pytest.approx((q1 - p).std(-1).mean().item(), abs=1e-4)
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
        world.run.metrics("brain")[0]["gradient_norm"], rel=1e-5)  # lr decays, step 0 is the same
    one, other = whole.result(), parts.result()
    for name in ("reward_prior", "reward_policy", "kl_to_prior", "win_rate_vs_prior"):
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


# Three families, four kinds of reward model.


def write_judge(folder: Path, checkpoint: Path) -> Path:
    """The README's judge.py, for this reward model."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    program, = (block for block in blocks if block.startswith("import torch  # judge.py"))
    assert program.count('"MODEL"') == 1
    (folder / "judge.py").write_text(program.replace('"MODEL"', repr(str(checkpoint))))
    return folder / "judge.py"


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
               reward_batch=16, reward_epochs=4, hh_subsets="harmless-base helpful-base")


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
    samples that stand beside another prompt. Texts must reach the models through pack."""
    with recorded("pack") as calls:
        run = launch(tmp_path / "run", task="hh", data_dir=hh_dir, hh_subsets="helpful-base",
                     prior=checkpoints / "llama/prior", reward=checkpoints / "llama/reward",
                     temperature=0.7, eval_prompts=12)
    assert_complete(run, "hh", temperature=0.7)
    assert_frozen_between_refreshes(run.metrics("brain"))
    assert not (run.folder / "prior").exists() and not (run.folder / "reward").exists()
    packed = [(x, y) for (xs, yss, *_), _ in calls for x, ys in zip(xs, yss, strict=True)
              for y in ys]
    plain = functools.partial(build_tokenizer(bos=True), add_special_tokens=False)
    rows = dict(split_dialogue(make_dialogue(700 + i))[:2] for i in range(12))
    seen = [x for x, _ in packed]
    assert all([1] + plain(prompt).input_ids in seen for prompt in rows)
    assert {x[0] for x in seen[-24:]} == {1} and all(1 not in x[1:] for x in seen[-24:])
    shown = run.samples("policy")
    assert {line["prompt"] for line in shown} == rows.keys()
    report = (run.folder / "report.md").read_text()
    told = [line for line in shown if
            f"- policy: `{line['prompt'][-100:]!r}` → `{line['responses'][0]!r}`" in report]
    assert len(told) == report.count("- policy: ") >= 2


def test_samples_are_all_there(world, known):
    """Catches samples left out of samples.jsonl, beside another prompt, or with another's reward:
    each evaluated response of prior and policy against the known world."""
    space = {"".join([EOS if i == 0 else " abcd"[i] for i in y]): k
             for k, y in enumerate(sorted(response_space(5, 3), key=len))}
    for model in ("prior", "policy"):
        lines = world.run.samples(model)
        assert sorted(line["prompt"] for line in lines) == sorted(known.prompts)
        for line in lines:
            place = known.prompts.index(line["prompt"])
            assert len(line["responses"]) == len(line["rewards"]) == 256
            where = [space[y.replace(" ", "")] for y in line["responses"]]
            torch.testing.assert_close(torch.tensor(line["rewards"]).double(),
                                       known.reward[place, where], rtol=0, atol=1e-3)


def test_run_of_gpt2_with_a_decoder_of_another_tokenizer(hh_dir, checkpoints, tmp_path):
    """Catches dropout left on (0.1 in GPT-2's config: log-ratios would not be 0), positions that
    left padding shifts, and a README's judge.py that does not read a decoder's own tokens, its
    BOS and its end-of-text."""
    rows = [dict(zip(brain.Example._fields, split_dialogue(make_dialogue(i)), strict=True))
            for i in range(32)]
    write_lines(tmp_path / "data/train.jsonl", rows[:24])
    write_lines(tmp_path / "data/test.jsonl", rows[24:])
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path / "data",
                 prior=checkpoints / "gpt2/prior",
                 reward=write_judge(tmp_path, checkpoints / "llama/reward"))
    assert_complete(run, "jsonl")
    assert_frozen_between_refreshes(run.metrics("brain"))
    tokenizer = build_tokenizer(bos=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints / "llama/reward").eval()
    for line in run.samples("policy"):
        for response, reward in zip(line["responses"], line["rewards"], strict=True):
            ids = tokenizer(response.removesuffix(EOS)).input_ids[1:] + [0]
            exact = own_head_reward(model, tokenizer(line["prompt"]).input_ids, ids)
            missing = not response.endswith(EOS)
            assert reward == pytest.approx(exact.item() - missing, abs=1e-3)


def test_run_on_prompts_alone(checkpoints, tmp_path):
    """Catches a task without references that stops the run."""
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [{"prompt": say(5, i)} for i in range(9)])
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, steps=2,
                 prior=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward")
    result = run.result()
    assert result.keys() >= RESULT_KEYS and len(run.samples("policy")) == 8


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_run_in_bf16(family, hh_dir, checkpoints, tmp_path, monkeypatch):
    """Catches what only CUDA's arithmetic would show, with autocast and bf16 weights on the CPU:
    log-ratios that rounding moves off 0 after a refresh, or between prior and policy at the start,
    tensors of two types in one operation, a guard that trips on rounding; and weights of the policy
    that are not fp32."""
    start = brain.Run.__init__

    def as_on_cuda(run, cfg):
        start(run, cfg)
        run.dtype = torch.bfloat16
        run.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    monkeypatch.setattr(brain.Run, "__init__", as_on_cuda)
    run = launch(tmp_path / "run", task="hh", data_dir=hh_dir, hh_subsets="helpful-base",
                 prior=checkpoints / f"{family}/prior", reward=checkpoints / f"{family}/reward")
    assert_complete(run, "hh")
    assert_frozen_between_refreshes(run.metrics("brain"))
    first = run.metrics("brain")[0]
    assert first["refresh_kl"] == first["refresh_kl_sd"] == 0  # equal weights have equal scores
    for tensor in transformers.AutoModelForCausalLM.from_pretrained(
            run.folder / "policy").state_dict().values():
        assert tensor.dtype == torch.float32 and (tensor != tensor.bfloat16()).any()


class Terminal(io.StringIO):
    """A stdout that somebody looks at."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_bars_only_where_somebody_looks(stream, checkpoints, tmp_path, monkeypatch):
    """Catches bars in a log file, none on a terminal, and an end that is not the report's samples
    and table, the last line aside."""
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [{"prompt": say(5, i)} for i in range(9)])
    monkeypatch.setattr(io, "StringIO", stream)
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, steps=2, save_every=1,
                 prior=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward")
    assert run.result()
    if stream is Terminal:
        for what in ("reading train: 100%", "brain: 100%", "loss="):
            assert what in run.stderr, what
    else:
        assert not run.stderr
    printed, written = run.stdout.splitlines(), (run.folder / "report.md").read_text().splitlines()
    table = [line for line in written if line.startswith("|")]
    samples = [line for line in written if line.startswith(("- prior: `", "- policy: `"))]
    assert len(table) >= 4 and len(samples) >= 4
    assert [line for line in printed if line in samples] == samples
    assert printed[-2 - len(table) : -2] == table  # then the report's place and the figures


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
    prompts = [prompt for prompt, _ in expected_tldr(tokenizer, "test", 512)]
    lines = run.samples("policy")
    assert sorted(line["prompt"] for line in lines) == sorted(prompts)
    for line in lines:
        for response, reward in zip(line["responses"], line["rewards"], strict=True):
            ids = tokenizer(response).input_ids
            if tokenizer.decode(ids) == response and response.endswith(EOS):
                exact = own_head_reward(model, tokenizer(line["prompt"]).input_ids, ids)
                assert reward == pytest.approx(exact.item(), abs=1e-3)


def test_run_on_tldr_with_a_bert(tldr_dir, checkpoints, tmp_path):
    """Catches a README's judge.py that gives an encoder ids of the policy's tokenizer, or special
    tokens as text: each sample is scored as a pair of texts with the model's own tokenizer."""
    run = launch(tmp_path / "run", task="tldr", data_dir=tldr_dir, max_prompt_tokens=256, steps=2,
                 prior=checkpoints / "llama/prior",
                 reward=write_judge(tmp_path, checkpoints / "bert"))
    assert run.status == 0, run.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints / "bert").eval()
    seen = []
    for line in run.samples("policy"):
        for response, reward in zip(line["responses"], line["rewards"], strict=True):
            text = response.removesuffix(EOS).replace("<s>", "").replace(EOS, "")
            pair = tokenizer(line["prompt"], text, return_tensors="pt")
            seen.append(model(**pair).logits.item())
            penalty = 0 if EOS in response else 1
            assert reward == pytest.approx(seen[-1] - penalty, abs=1e-3)
    assert max(seen) - min(seen) > 0.05


@pytest.mark.parametrize("tokenizer", ["own", "the prior's"])
def test_an_encoder_is_no_decoder(tokenizer, tldr_dir, checkpoints, tmp_path):
    """Catches an encoder that reads the policy's ids, its tokenizer being the prior's or not, and
    a refusal that does not name the way out."""
    folder = checkpoints / "bert"
    if tokenizer != "own":
        config = transformers.BertConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "llama/prior")
        tokenizer.pad_token = tokenizer.eos_token
        config.vocab_size, folder = max(500, len(tokenizer)), tmp_path / "bert"
        for part in (tokenizer, transformers.BertForSequenceClassification(config)):
            part.save_pretrained(folder)
    run = launch(tmp_path / "run", task="tldr", data_dir=tldr_dir, max_prompt_tokens=256, steps=2,
                 prior=checkpoints / "llama/prior", reward=folder)
    assert run.status == 2 and len(run.stderr.splitlines()) == 1
    assert f"{folder} does not read the prior's tokens" in run.stderr and "FILE.py" in run.stderr


def test_run_on_tldr_from_a_base_model(tldr_dir, checkpoints, tmp_path):
    """Catches a base that is not fine-tuned on the posts before it is the prior, and prompts of the
    policy's training that are not the training posts."""
    with recorded("sample") as calls:
        run = launch(tmp_path / "run", task="tldr", data_dir=tldr_dir, max_prompt_tokens=128,
                     base=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward",
                     sft_batch=8, sft_lr=1e-3)
    assert_complete(run, "tldr", temperature=0.7)
    assert len(run.metrics("sft")) == 3 and not run.metrics("reward")
    training = [x for (_, prompts, n, *_), _ in calls if n == 4 for x in prompts]  # eval has 2
    tokenizer = build_tokenizer()
    posts = [prompt for prompt, _ in expected_tldr(tokenizer, "train", 128)]
    assert len(training) == 16 and all(tokenizer.decode(x) in posts for x in training)


def test_run_on_comparisons_without_references(tmp_path):
    """Catches prompts that are lost to stage 3 because their rows are comparisons alone."""
    rows = [{"prompt": f"{word} cat", "chosen": " yes .", "rejected": " no"} for word in WORDS[:12]]
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, reward_batch=6,
                 prior=save_checkpoint(tmp_path / "prior"))
    assert run.result() and len(run.metrics("brain")) == 4


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


# ---- Bad input -----------------------------------------------------------------------------------

PROMPT = "\n\nHuman: can you say why the cat was up ?\n\nAssistant:"
GOOD_ROWS = {  # one good row of each file format
    "jsonl": {"prompt": PROMPT, "reference": " so be it .", "chosen": " yes .",
              "rejected": " no ."},
    "hh": {"chosen": PROMPT + " it was a good day .", "rejected": PROMPT + " no !"},
    "posts": {"id": "t3_1", "subreddit": "AskReddit", "title": "a dog", "summary": "dog ran off",
              "post": "i say no to dogs .\nbut the dog , he say yes \u2013 so i run ."},
}


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
    posts = [GOOD_ROWS["posts"]] * 3
    write_tldr(root / "tldr", train=posts, test=posts)
    write_tldr(root / "untitled", train=[{**GOOD_ROWS["posts"], "title": None}], test=posts)

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
    ("kl_coef 0", "--kl_coef 0", "--kl.coef.*between"),
    ("kl_coef below 0", "--kl-coef -0.1", "--kl.coef.*between"),
    ("kl_coef nan", "--kl_coef nan", "--kl.coef.*nan"),
    ("infinite lr", "--lr inf", "--lr.*inf"),
    ("temperature 0", "--temperature 0", "--temperature.*between"),
    ("negative penalty", "--missing_eos_penalty -1", "--missing.eos.penalty"),
    ("negative seed", "--seed -1", "--seed.*between 0"),
    ("huge seed", "--seed 99999999999999999999999", "--seed.*between 0"),
    ("one sample per prompt", "--samples_per_prompt 1", "--samples.per.prompt.*2"),
    ("one sample in the evaluation", "--eval_samples 1", "--eval.samples.*2"),
    ("refresh no multiple of the step", "--prompts_per_step 16 --prompts_per_refresh 40",
     "--prompts.per.refresh.*multiple"),
    ("reverse with argmax", "--divergence reverse --target argmax", "reverse"),
    ("reverse with another baseline", "--divergence reverse --baseline none", "reverse"),
    ("base with prior", "--base {prior} --prior {prior}", "--base.*--prior"),
    ("jsonl without a model", JSONL + " --data_dir {data}", "--base or --prior"),
    ("jsonl without data", JSONL + " --prior {prior}", "--data_dir"),
    ("cuda without CUDA", "--device cuda", "CUDA.*--device|--device.*CUDA"),
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
    ("every prompt too long", f"{JSONL} {BOTH} --data_dir {{long}}",
     "jsonl train: 0 of 1 rows.*too long"),
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
     "--data_dir {hh_parted}", "hh train: 0 of 1 rows.*broken"),
    ("hh offline", f"--task hh --hh_subsets helpful-base {BOTH} {LIMITS} --data_dir {{hh}}",
     r"helpful-base/train\.jsonl\.gz.*--data_dir"),
    ("tldr without a reward model", f"--task tldr --device cpu --base {{prior}} {LIMITS} "
     "--data_dir {tldr}", "--reward"),
    ("post without title", f"--task tldr --device cpu {BOTH} {LIMITS} --data_dir {{untitled}}",
     r"train\.jsonl:1: .*title"),
    # checkpoints and tokenizers
    ("longer than the context", f"--task jsonl --device cpu {BOTH} --data_dir {{data}} "
     "--max_prompt_tokens 600", "640.*--max_"),
    ("comparisons over the context", "--task jsonl --device cpu --prior {prior} --data_dir {data} "
     "--max_comparison_tokens 600", "640.*--max_"),
    ("no such checkpoint", JSONL + " --prior {root}/none --data_dir {data}", "/none"),
    ("hub offline", JSONL + " --prior nobody/nothing-at-all --data_dir {data}", "nobody/nothing"),
    ("checkpoint is a file", JSONL + " --prior {file} --data_dir {data}", "file"),
    ("BERT as prior", JSONL + " --prior {bert} --data_dir {data}", "bert"),
    ("T5 as prior", JSONL + " --prior {t5} --data_dir {data}", "t5|T5"),
    ("reward model as prior", JSONL + " --prior {reward} --data_dir {data}", "/reward .*"),
    ("reward model as base", JSONL + " --base {reward} --data_dir {data}", "/reward .*"),
    ("causal LM as reward", JSONL + " --prior {prior} --reward {prior} --data_dir {data}",
     "/prior .*another use"),
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
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.name == "lock" for path in left), "a refused command leaves nothing behind"
    assert Path(shelf["file"]).read_text() == before


# ---- Fuzzing: the row parsers --------------------------------------------------------------------

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
        name = rng.choice(list(GOOD_ROWS["jsonl"]) + ["subreddit", "post", "summary", "title"])
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
    post = prompt.removeprefix(f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}"
                               "\n\nPOST: ").removesuffix("\n\nTL;DR:")
    return row["post"].startswith(post) and list(example[1:]) == [
        " " + row["summary"].strip(), None, None]


@pytest.mark.parametrize("kind", list(GOOD_ROWS))
def test_mutated_rows_are_told_or_right(kind, tmp_path):
    """Catches a parser that passes a wrong type on, or that dies with another error than Stop:
    a thousand mutations of a good row of each format, read from files."""
    rng, tokenizer, good = random.Random(kind), build_tokenizer(), GOOD_ROWS[kind]
    argv = {"jsonl": f"{JSONL} --prior x", "hh": f"--task hh --hh_subsets s --prior x {LIMITS}",
            "posts": f"--task tldr --prior x --reward y {LIMITS}"}[kind]
    cfg = brain.parse_config([*argv.split(), "--data_dir", str(tmp_path)])
    path = tmp_path / {"jsonl": "train.jsonl", "hh": "s/train.jsonl.gz",
                       "posts": "datasets/tldr_3_filtered/train.jsonl"}[kind]
    (write_gz if kind == "hh" else write_lines)(path, [good])
    assert [is_right(e, kind, good) for e in brain.load_task(cfg, "train", tokenizer)] == [True]
    right = told = 0
    for _ in range(1000):
        line = mutate(rng, good)
        path.write_bytes(gzip.compress(line, 1) if kind == "hh" else line)
        try:
            examples = brain.load_task(cfg, "train", tokenizer)
        except brain.Stop as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and len(message) < 1000, (line, message)
            assert path.name in message or "usable row" in message, (line, message)
            told += 1
            continue
        for example in examples:
            right += 1
            assert len(examples) == 1 and example.prompt.strip(), line
            assert all(text is None or type(text) is str for text in example), line
            "".join(text or "" for text in example).encode()  # no surrogates
            assert is_right(example, kind, json.loads(line)), (line, example)
    assert min(right, told) >= 100, (right, told)  # both sides were tried


# ---- Kills, full disks, faults: toy, 16 + 16 + 20 steps, responses of up to 2 tokens -------------

STAGES = {"sft": 0, "reward": 16, "brain": 32}  # stage: steps before it
EVERY = 6  # steps between states: --save_every, rounded up to whole refreshes of two steps
SMALL = ("--task toy --device cpu --steps 20 --save_every 5 --max_response_tokens 2 "
         "--max_comparison_tokens 2 --sft_epochs 1 --sft_batch 128 --reward_epochs 1 "
         "--reward_batch 128 --samples_per_prompt 4 --prompts_per_step 4 --prompts_per_refresh 8 "
         "--eval_prompts 8 --out").split()


def die_within_a_save() -> None:
    """From now on: kill -9 when half of the second state of stage 3 is written."""
    real, calls = torch.save, []

    def save(state, file, *rest, **options):
        calls.append(state["stage"])
        if calls.count("brain") == 2:
            whole = io.BytesIO()
            real(state, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(state, file, *rest, **options)

    torch.save = save


def fingerprint(out: Path) -> tuple:
    """All that must be equal in two runs of one command: metrics without timings, and weights."""
    weights = [(out / name / "model.safetensors").read_bytes()
               for name in ("prior", "reward", "policy") if (out / name).exists()]
    return metrics_of(out), weights


def figures(stdout: str) -> dict:
    """The JSON object of the last line of stdout, timings left out."""
    found = json.loads(stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if not key.startswith("seconds")}


def stop_at(out: Path, lines: int) -> Finished:
    """A process that runs SMALL in `out`, killed (-9) once metrics.jsonl has so many lines."""
    process = subprocess.Popen(
        [sys.executable, brain.__file__, *SMALL, str(out)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    path, end = out / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    process.kill()
    stdout, stderr = process.communicate(timeout=60)
    return Finished(process.returncode, stdout, stderr, out)


def begins_at(stdout: str) -> int:
    """The step, counted over all stages, that a run's first line says it continues from."""
    found = re.search(r"stage (\w+)\W+step (\d+)", stdout.splitlines()[0])
    return STAGES[found[1]] + int(found[2]) if found else 0


def small(out: Path, *flags: str) -> Finished:
    """SMALL with more flags, in this process."""
    return finish([*SMALL[:-1], *flags], out)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Finished:
    """A run that nothing happens to."""
    run = small(tmp_path_factory.mktemp("unbroken") / "run")
    assert run.status == 0 and not run.stderr, run.stderr
    stages = [line["stage"] for line in run.metrics()]
    assert stages == ["sft"] * 16 + ["reward"] * 16 + ["brain"] * 20
    return run


@pytest.fixture(scope="module")
def brief(unbroken) -> list[str]:
    """The flags of a run that has the prior and the reward model already: stage 3 alone."""
    out = unbroken.folder
    return ["--prior", str(out / "prior"), "--reward", str(out / "reward"), "--steps", "8",
            "--save_every", "4"]


@pytest.fixture(scope="module")
def brief_run(brief, tmp_path_factory) -> Path:
    """The folder of such a run that nothing happened to."""
    out = tmp_path_factory.mktemp("brief") / "run"
    assert brain.main([*SMALL, str(out), *brief]) == 0
    return out


@pytest.fixture(scope="module", autouse=True)
def toy_rows_drawn_once():
    """A short run spends a seventh of its time on drawing toy's rows, which its seed decides."""
    real = brain.toy_examples
    rows = functools.cache(lambda seed, split: list(real(SimpleNamespace(seed=seed), split)))
    brain.toy_examples = lambda cfg, split: iter(rows(cfg.seed, split))
    yield
    brain.toy_examples = real


def interrupt(*_, **__):
    """Ctrl-C, at once; a signal may arrive a little later."""
    raise KeyboardInterrupt


def test_a_killed_run_ends_as_if_it_had_not_been(unbroken, tmp_path, monkeypatch):
    """Catches state that is not saved (optimizer, position, the refresh's samples), a state file
    that a kill can spoil, metrics written twice, and work repeated without need: kill -9 in the
    first stage, Ctrl-C in the second, kill -9 within a save of the third."""
    out, written, losses = tmp_path / "run", 0, itertools.count(1)
    real = brain.preference_loss  # Ctrl-C in the fifth step of its stage
    monkeypatch.setattr(brain, "preference_loss", lambda *args: (
        interrupt() if next(losses) == 5 else real(*args)))
    for part, status in ((lambda: stop_at(out, 13), -signal.SIGKILL), (lambda: small(out), 130),
                         (lambda: forked([*SMALL, out], tmp_path, die_within_a_save),
                          -signal.SIGKILL), (lambda: small(out), 0)):
        run = part()
        assert run.status == status, run.stderr
        assert written - EVERY <= begins_at(run.stdout) <= written, run.stdout.splitlines()[0]
        torch.load(out / "state.pt", weights_only=True)  # the state is whole
        written = len(lines_of(out))
        if status == 130:
            assert run.stderr.startswith("brain.py: ") and "continue" in run.stderr
            assert run.stderr.count("\n") == 1
    assert "brain" in run.stdout.splitlines()[0] and not run.stderr
    assert fingerprint(out) == fingerprint(unbroken.folder)
    assert figures(run.stdout) == figures(unbroken.stdout)


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
    report = (out / "report.md").read_text().replace(str(out), str(brief_run))
    assert report == (brief_run / "report.md").read_text()


def test_a_finished_run_is_evaluated_again(unbroken):
    """Catches a second run over the first, other figures, and a compared setting that changes no
    number."""
    before, seconds = fingerprint(unbroken.folder), {"seconds": 0}
    for changes in ([], ["--save_every", "7", "--micro_batch_tokens", "16383", "--data_dir", "x"]):
        again = small(unbroken.folder, *changes)
        assert ", stage brain, step 20" in again.stdout
        assert again.result() | seconds == unbroken.result() | seconds
    assert fingerprint(unbroken.folder) == before


def test_a_lost_policy_is_made_again(brief, brief_run, tmp_path):
    """Catches a finished run that says so though its policy is gone, or that makes another one."""
    out = tmp_path / "run"
    shutil.copytree(brief_run, out)
    shutil.rmtree(out / "policy")
    assert small(out, *brief).status == 0
    assert fingerprint(out) == fingerprint(brief_run)


@pytest.mark.parametrize("change, says", [
    (["--kl_coef", "0.3"], "kl_coef.*0.4.*0.3"), (["--steps", "21"], "steps.*20.*21"),
    (["--seed", "1"], "seed.*0.*1"), (["--reward", "other"], "reward.*None.*other")])
def test_another_run_in_the_folder(change, says, unbroken, capfd):
    """Catches a run that goes on with other settings than its first half had."""
    before = fingerprint(unbroken.folder)
    error = refused(capfd, [*SMALL, str(unbroken.folder), *change])
    assert re.search(says, error) and "--overwrite" in error
    assert fingerprint(unbroken.folder) == before


def test_the_folder_is_claimed_before_the_first_step(tmp_path, capfd, monkeypatch):
    """Catches a run that dies before it saves weights, and then goes on as another run."""
    monkeypatch.setattr(brain, "sft_loss", interrupt)
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
    """Catches a report without what its figures rest on, or with other figures than the last
    line's: a table whose cells are those of result.json, the exact KLs."""
    found, text = unbroken.result(), (unbroken.folder / "report.md").read_text()
    config = json.loads((unbroken.folder / "config.json").read_text())
    assert all(f"{name}={value!r}" in text for name, value in config.items())
    table = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["", "prior", "policy"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert rows["reward"] == [str(round(found[f"reward_{name}"], 3)) for name in table[0][1:]]
    for name in found.keys() - {"task", "steps", "seconds", "reward_prior", "reward_policy"}:
        value = found[name]
        shown = [round(x, 3) for x in value] if name.endswith("_ci") else round(value, 3)
        assert rows[name][1] == str(shown), name
    assert rows["kl_to_prior"][0] == "0.0" and rows["win_rate_vs_prior"][0] == ""
    for name in ("prior", "policy"):
        samples = unbroken.samples(name)
        assert len(samples) == 8 and {len(line["responses"]) for line in samples} == {4}


# ---- Statistics ----------------------------------------------------------------------------------


def outcomes_of(rate: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The values of a prompt's share of wins, 4 against 4 samples, and how likely each is, where
    the win rate is `rate`: prompts of two kinds, one that the policy wins nearly always, one that
    it loses; three levels of reward, so there are ties. Exact, from all 3^8 outcomes."""
    level = torch.tensor(list(itertools.product(range(3), repeat=4))).double()  # (81, 4)
    better, worse = torch.tensor([0.05, 0.2, 0.75]), torch.tensor([0.7, 0.25, 0.05])
    likely = [p.double()[level.long()].prod(-1) for p in (better, worse)]  # (81,) each
    share = preference(*(x.reshape(-1, 4) for x in (
        level[:, None].expand(-1, 81, -1), level.expand(81, -1, -1))))  # (81²,)
    wins = (likely[0][:, None] * likely[1]).flatten().double()
    wins, losses = wins / wins.sum(), (likely[1][:, None] * likely[0]).flatten() / wins.sum()
    best = (wins * share).sum()  # of the kind that the policy wins
    mixed = (rate - (1 - best)) / (2 * best - 1)
    values, index = share.double().unique(return_inverse=True)
    chance = torch.zeros_like(values).index_add_(0, index, mixed * wins + (1 - mixed) * losses)
    return values.numpy(), (chance / chance.sum()).numpy()


STUDENT = {16: 2.13145, 24: 2.06866, 32: 2.03951, 64: 1.99834, 128: 1.97882, 256: 1.96927}


def intervals_of(shares: Tensor) -> tuple[Tensor, Tensor]:
    """brain.win_rate's intervals of many data sets, (sets, prompts): the two roots in w of
    (mean - w)^2 = t^2 w (1 - w) / trials."""
    mean, prompts = shares.mean(1), shares.shape[1]
    most, luck = mean * (1 - mean), 0.014 / prompts
    trials = (prompts - 1) * (most**2 + luck) / (most * shares.var(1, correction=0) + luck)
    z2 = 3.84 * math.exp(2.42 / (prompts - 1.5)) / trials.clamp(max=64 * prompts)
    root = ((2 * mean + z2) ** 2 - 4 * (1 + z2) * mean**2).clamp(min=0).sqrt()
    return (2 * mean + z2 - root) / (2 + 2 * z2), (2 * mean + z2 + root) / (2 + 2 * z2)


def shares_of(kind: str, rate: float, prompts: int, opponents: int) -> Tensor:
    """Shares of wins, (data sets, prompts), of 4 samples against `opponents`. "tied" is the two
    kinds of outcomes_of. Else the policy's rewards are N(shift, 1), so that it wins a pair with a
    chance that is drawn per prompt and has the mean `rate`, the others' N(0, 1), a reference's 0"""
    rng, shape = numpy.random.default_rng(0), (400_000 // prompts, prompts)
    if kind == "tied":
        values, chance = outcomes_of(rate)
        return torch.from_numpy(rng.choice(values, shape, p=chance))
    chance = numpy.full(shape, rate)
    if kind == "beta":
        chance = rng.beta(0.3 * rate, 0.3 * (1 - rate), shape)
    if kind in ("two", "whole"):
        low, high = {"two": (0.03, 0.97), "whole": (1e-9, 1 - 1e-9)}[kind]
        chance = numpy.where(rng.random(shape) < (rate - low) / (high - low), high, low)
    chance = torch.from_numpy(chance).clamp(1e-9, 1 - 1e-9).reshape(-1, 1)
    shift = torch.special.ndtri(chance).float() * (2**0.5 if opponents > 1 else 1)
    random = torch.from_numpy(rng.standard_normal((len(shift), 4 + opponents), numpy.float32))
    others = random[:, 4:] * (opponents > 1)
    return preference(random[:, :4] + shift, others).reshape(shape).double()


@pytest.mark.parametrize("kind, rate, prompts, opponents", [
    ("alike", 0.5, 16, 4), ("alike", 0.9, 16, 4), ("alike", 0.95, 64, 4), ("alike", 0.6, 24, 1),
    ("tied", 0.8, 16, 4), ("tied", 0.15, 32, 4), ("tied", 0.9, 64, 4), ("tied", 0.5, 256, 4),
    ("two", 0.9, 16, 4), ("two", 0.1, 24, 4), ("two", 0.9, 32, 1), ("two", 0.95, 64, 4),
    ("beta", 0.7, 16, 1), ("beta", 0.9, 24, 4), ("beta", 0.05, 64, 4), ("beta", 0.95, 256, 1),
    ("whole", 0.6, 16, 1), ("whole", 0.9, 32, 4), ("whole", 0.95, 128, 1)])
def test_win_rate_intervals_cover(kind, rate, prompts, opponents):
    """Catches intervals that take the pairs of a prompt for independent, ties for losses, a lucky
    small spread for the true one, 1.96 for Student's t: 1562 to 25,000 data sets with a known win
    rate. And ones that are too wide: on average over 1.3 times Student's with the true error."""
    shares = shares_of(kind, rate, prompts, opponents)
    low, high = intervals_of(shares)
    for i in range(0, len(shares), len(shares) // 50):  # the formula above is brain.py's
        assert brain.win_rate(shares[i])[1] == pytest.approx(
            [low[i].item(), high[i].item()], abs=1e-9)
        assert brain.win_rate(shares[i])[0] == pytest.approx(shares[i].mean().item())
    assert abs(shares.mean() - rate) < 0.003
    coverage = ((low <= rate) & (rate <= high)).double().mean()
    noise = math.sqrt(0.92 * 0.08 / len(shares))
    assert coverage >= 0.92 - 2 * noise, coverage  # most of these cases have 0.95
    width = 2 * STUDENT[prompts] * shares.std() / math.sqrt(prompts)
    assert (high - low).mean() <= 1.3 * width, (high - low).mean() / width


@pytest.mark.parametrize("prompts, least", [(3, 0.5), (16, 0.05), (256, 0.009)])
@pytest.mark.parametrize("share", [0.0, 1.0, 0.5, 1 / 3, 8 / 9])
def test_win_rate_intervals_of_equal_shares(share, prompts, least):
    """Catches a division by zero, or an interval of no width, where all prompts agree, or almost:
    rounding gives equal shares of 1/3 or 8/9 a tiny spread."""
    for wins in (torch.full((prompts,), share), torch.full((prompts,), share).double()):
        rate, (low, high) = brain.win_rate(wins)
        assert -1e-9 < low < rate + 1e-9 and rate - 1e-9 < high < 1 + 1e-9
        assert rate == pytest.approx(share, abs=1e-6) and least < high - low < 1


def test_kl_and_its_error_are_of_prompts(world):
    """Catches an error bar from all samples as if they were independent, a KL of the wrong sign or
    of other samples than the policy's in the evaluation."""
    [batches] = [found for (_, _, name, *_), found in world.samples if name == "policy"][-1]
    ratio = torch.cat([batch.scores["log_proposal"] - batch.scores["log_prior"]
                       for batch in batches]).double().mean(-1)
    result = world.run.result()
    assert ratio.shape == (16,) and result["kl_to_prior"] == pytest.approx(ratio.mean().item())
    assert result["kl_to_prior_se"] == pytest.approx(ratio.std().item() / 4, abs=1e-6)


def test_kl_intervals_cover():
    """Catches a formula of the test above whose error bars are too short: 20,000 draws of 64
    prompts with 4 samples each, from a population whose exact KL is known."""
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
    coverage = ((estimate - truth).abs() <= 1.96 * error).double().mean()
    assert 0.93 <= coverage <= 0.97, coverage


# ---- A task that can be checked: `python test_brain.py capitals FOLDER` (README, "Your own data")

CAPITALS_REWARD = '''def reward(prompts, responses, references):
    """The share of letters that are right, in their places."""
    pairs = zip(responses, references)
    return [sum(map(str.__eq__, y, z)) / max(len(y), len(z), 1) for y, z in pairs]
'''


def write_capitals(argv: list[str]) -> None:
    """300 words to write in capitals, 60 of them held out, a reward.py that reads the references,
    and a base model of letters that knows nothing yet: into the FOLDER of argv."""
    folder, rng, end = Path(argv[0]), random.Random(0), "<|endoftext|>"
    spelled = itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst", "aeiou")
    rows = [{"prompt": f"Write this word in capitals: {word}\n", "reference": word.upper()}
            for word in rng.sample(["".join(letters) for letters in spelled], 300)]
    write_lines(folder / "test.jsonl", rows[:60])
    write_lines(folder / "train.jsonl", rows[60:])
    (folder / "reward.py").write_text(CAPITALS_REWARD, encoding="utf-8")

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([end, *alphabet])}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))  # a token a byte
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token=end, unk_token=end).save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64, rotary_pct=1.0, bos_token_id=0,
        eos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")


# ---- One prompt, exactly: `python test_brain.py prompt OUT` (README, "The method")


@torch.no_grad()
def print_prompt(argv: list[str]) -> None:
    """A held-out prompt of a finished toy run, OUT [INDEX]: the four responses with most posterior
    and two more with most prior, with prior, reward, posterior and policy, over all responses."""
    out, index = Path(argv[0]), int(argv[1]) if argv[1:] else 0
    cfg = brain.Config(**json.loads((out / "config.json").read_text(encoding="utf-8")))
    prior, policy = (transformers.AutoModelForCausalLM.from_pretrained(Path(folder))
                     for folder in (cfg.prior or out / "prior", out / "policy"))
    reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(
        Path(cfg.reward or out / "reward"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "policy")
    prompt = brain.load_task(cfg, "test", tokenizer)[index].prompt
    drawn = itertools.product(range(len(tokenizer)), repeat=cfg.max_response_tokens)
    space = [list(y) for y in dict.fromkeys(y[: (*y, 0).index(0) + 1] for y in drawn)]

    batch = brain.pack(tokenizer([prompt]).input_ids, [space])
    p, q = (brain.sequence_log_prob(model, batch, cfg.temperature)[0] for model in (prior, policy))
    unended = torch.tensor([float(y[-1] != 0) for y in space])
    reward = brain.score_reward(reward_model, batch)[0] - cfg.missing_eos_penalty * unended
    posterior = (p + reward / cfg.kl_coef).softmax(-1)  # (|Y|,)
    shown = posterior.argsort(descending=True)[:4].tolist()
    shown += [i for i in p.argsort(descending=True).tolist() if i not in shown][:2]

    print(f"\n`{prompt}`, kl_coef {cfg.kl_coef}\n")
    print("| response | prior p | reward r | posterior | policy q |\n|---|---|---|---|---|")
    for i in shown:
        print(f"| `{tokenizer.decode(space[i])}` | {p[i].exp():.3f} | {reward[i]:.2f} | "
              f"{posterior[i]:.3f} | {q[i].exp():.3f} |")
    rest = (1 - x[shown].sum() for x in (p.exp(), posterior, q.exp()))
    print("| the other {:,} | {:.3f} | | {:.3f} | {:.3f} |".format(len(space) - len(shown), *rest))
    kls = ((posterior * (posterior.log() - log_q)).sum() for log_q in (p, q))
    print("\nKL(posterior ‖ prior) {:.3f} nats, KL(posterior ‖ policy) {:.3f}".format(*kls))


# ---- The front page -----------------------------------------------------------------------------
# Every command is parsed, every snippet runs, every name that is mentioned exists.

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCE = (HERE / "brain.py").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading of the README, down to the next of its rank."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of a section."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


def commands(pattern: str) -> list[str]:
    """Every command of the README that matches, from code blocks and from `inline code` alike."""
    joined = README.replace("\\\n", " ")
    return sorted({found.partition("#")[0].strip() for found in re.findall(pattern, joined)})


def run_snippet(code: str, *argv: str) -> str:
    """What a snippet of the README prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["snippet.py", *argv])
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return said.getvalue()


@pytest.fixture(scope="module")
def shown_run(tmp_path_factory) -> Path:
    """A folder with out/toy, a toy run that is as short as can be, and all that it said."""
    folder = tmp_path_factory.mktemp("readme")
    said, listed = io.StringIO(), brain.enumerate_posterior
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, "enumerate_posterior", lambda run, prior, some: listed(
            run, prior, some[:1]))  # the slowest part
        assert not brain.main(["--steps=2", "--sft_epochs=1", "--reward_epochs=1",
                               "--prompts_per_step=8", "--prompts_per_refresh=8",
                               "--eval_prompts=3", f"--out={folder / 'out' / 'toy'}"])
    (folder / "said").write_text(said.getvalue(), encoding="utf-8")
    return folder


def test_front_page_is_short():
    """Catches a front page that nobody reads to its end."""
    open_page = re.sub(r"<details>.*?</details>", "", README, flags=re.S)
    assert README.count("<details>") == README.count("</details>") > 3
    assert len(open_page.split()) <= 3000, len(open_page.split())


@pytest.mark.parametrize("command", commands(r"python brain\.py[^`\n]*"))
def test_brain_commands_of_the_readme_parse(command):
    """Catches a command on the front page with a flag or a value that does not exist."""
    words = shlex.split(command)[2:]
    if "--help" not in words:
        assert isinstance(brain.parse_config(words), brain.Config)


@pytest.mark.parametrize("command", commands(r"(?m)(?:^|`)make [a-z]+"))
def test_make_commands_of_the_readme_exist(command):
    """Catches a command on the front page that the Makefile does not know."""
    rules = re.findall(r"^([a-z]+):", (HERE / "Makefile").read_text(encoding="utf-8"), re.M)
    assert command.strip("`").split()[1] in rules


@pytest.mark.parametrize("command", commands(r"python test_brain\.py[^`\n]*"))
def test_measuring_commands_of_the_readme_parse(command):
    """Catches a command behind one of the README's figures that cannot be repeated."""
    name, *words = shlex.split(command)[2:]
    assert name in PROGRAMS
    if name in ("bench", "trl"):
        assert parse_bench(words).samples


@pytest.mark.parametrize("command", commands(r"python -m pytest[^`\n]*"))
def test_pytest_commands_of_the_readme_find_a_test(command):
    """Catches a command behind one of the README's figures that runs no test."""
    words = shlex.split(command)
    tests = re.findall(r"^def (test_\w+)", (HERE / words[-1]).read_text(encoding="utf-8"), re.M)
    assert any(words[words.index("-k") + 1] in name for name in tests)


def test_what_the_readme_names_exists():
    """Catches a flag, a test, a function, a heading or a message that was renamed or removed."""
    theirs = section("Outgrowing one GPU")
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", README.replace(theirs, "")))
    known = {field.name for field in dataclasses.fields(brain.Config)} | {"help"}
    others = {"samples", "repeats", "micro_batch", "seeds", "methods", "hidden", "layers",
              "vocabulary", "prompt_tokens", "prompts"}  # test_brain.py's
    assert flags <= known | others, flags - known - others

    tests = (HERE / "test_brain.py").read_text(encoding="utf-8") + Path(__file__).read_text()
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`(\w+)`", "".join(re.findall(r"^\|.*", section(
            "From the paper to the code"), re.M))):
        assert f"def {name}(" in SOURCE or f"def {name}(" in tests, name
    for title in re.findall(r"\]\(#([\w-]+)\)", README):
        assert title in {heading.lower().replace(" ", "-").replace(",", "")
                         for heading in re.findall(r"^#+ (.*)", README, re.M)}, title
    for message in re.findall(r'^- \*\*.*?"([^"]+)"\*\*', section("Troubleshooting"), re.M):
        assert message in SOURCE, message


def test_rows_of_the_readme_are_read():
    """Catches an example row that brain.py refuses, and flags that do not parse."""
    rows = [json.loads(line) for line in blocks("Your own data", "json")[0].splitlines()]
    found = [brain.parse_example(row) for row in rows]
    assert [sum(text is not None for text in example) for example in found] == [1, 2, 3]
    (flags,) = (block for block in blocks("Your own data", "sh") if block.startswith("--"))
    words = shlex.split(flags)
    assert brain.parse_config(["--task=jsonl", "--base=M", "--data_dir=D", *words]).sft_batch < 64


def test_reward_function_of_the_readme(tmp_path):
    """Catches a reward function on the front page that is not the one that was measured, or that
    cannot judge: an empty text, a longer one."""
    code, _ = blocks("Your own data", "python")  # the other one is judge.py
    assert code == CAPITALS_REWARD and len(code.splitlines()) <= 5
    (tmp_path / "reward.py").write_text(code, encoding="utf-8")
    reward = runpy.run_path(str(tmp_path / "reward.py"))["reward"]
    assert reward(["x"] * 4, ["AB", "Ab", "", "ABCD"], ["AB"] * 4) == [1, 0.5, 0, 0.5]


def test_capitals_can_be_learned_from(tmp_path, monkeypatch, capsys):
    """Catches a checkable task that does not run: its program, and the README's command, cut to a
    few steps. That it is learned takes a minute: the README's figures."""
    monkeypatch.chdir(tmp_path)
    write_capitals(["capitals"])
    (block,) = (block for block in blocks("Your own data", "sh") if "capitals capitals" in block)
    command = block.replace("\\\n", " ").partition("python brain.py")[2].splitlines()[0]
    short = ["--steps=2", "--sft_epochs=1", "--eval_prompts=3", "--out=out/short"]
    assert brain.main([*shlex.split(command), *short]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert -1 <= said["reward_policy"] < 1


def test_snippets_of_the_readme_run(shown_run, monkeypatch):
    """Catches a snippet that no longer runs, or prints something else than it says."""
    monkeypatch.chdir(shown_run)
    table, load = blocks("Read and compare results", "python")
    assert len(table.splitlines()) <= 12
    lines = run_snippet(table, "out/toy/result.json").splitlines()
    run = json.loads(Path("out/toy/result.json").read_text(encoding="utf-8"))
    assert len(lines) == 2 and lines[1].split()[0] == "toy"
    assert f"{run['reward_policy']:.3f}" in lines[1] and f"{run['kl_to_prior']:.3f}" in lines[1]
    assert len(lines[1]) <= 80

    transformers.set_seed(0)
    responses = eval(run_snippet(load))
    words = set(brain.KEYS + brain.FILLERS + [brain.TLDR.strip()])
    assert len(responses) == 2 and all(set(text.split()) <= words for text in responses)


def test_the_loss_example_of_the_readme_runs():
    """Catches an example that no longer runs, or whose loss does not fall."""
    (code,) = blocks("Your own trainer", "python")
    losses = [float(line.split()[0]) for line in run_snippet(code).splitlines()]
    assert losses == sorted(losses, reverse=True) and len(losses) == 3


def test_what_a_run_shows_is_in_the_readme(shown_run, monkeypatch, capsys):
    """Catches a screen, a file, a metric or a figure of the last line that the README leaves out,
    and a prompt's table whose columns do not sum to 1."""
    run = shown_run / "out" / "toy"
    files = set(re.findall(r"`([\w.]+?)/?`", "".join(
        line.rpartition(" | ")[0] for line in section("Read and compare results").splitlines()
        if line.startswith("| `"))))
    assert files == set(os.listdir(run))
    said = (shown_run / "said").read_text(encoding="utf-8").splitlines()
    screen = blocks("Run it", "text")[0]
    header = said[[line[:4] for line in said].index("|---") - 1]
    assert header in screen
    assert set(re.findall(r'"(\w+)": ', screen)) <= set(json.loads(said[-1]))

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = {key for line in lines for key in json.loads(line)} - {"stage", "step"}
    explained = set(re.findall(r"`(\w+)`", "".join(
        line.split("|")[1] for line in section("Metrics").splitlines() if line.startswith("| `"))))
    assert metrics == explained, metrics ^ explained

    print_prompt([str(run)])
    table = [line.split("|") for line in capsys.readouterr().out.splitlines()
             if line.startswith("| `") or line.startswith("| the other")]
    assert len(table) == 7
    for column in (2, 4, 5):
        assert sum(float(row[column]) for row in table) == pytest.approx(1, abs=5e-3)


def test_exercises_of_the_readme_can_be_done():
    """Catches an exercise whose line is no longer in brain.py, or that does not do what it says."""
    found = re.findall(r"^```diff\n(.*?)^```$", section("Exercises"), re.M | re.S)
    changed = []
    for diff in found:
        old, new = ("".join(f"{line[1:]}\n" for line in diff.splitlines() if line[:1] in wanted)
                    for wanted in (" -", " +"))
        assert SOURCE.count(old) == 1, old
        changed.append({"__name__": "changed"})
        exec(compile(SOURCE.replace(old, new), "brain.py", "exec"), changed[-1])
    sign, ranks = changed[0], changed[-1]
    assert {c.name for c in sign["derivation_checks"]() if not c.ok} == {"self_normalized", "DPO"}
    reward = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    alpha = [ranks["snis_weights"](*[torch.zeros(1, 4)] * 3, r, 0.5, "ranks").alpha_hat
             for r in (reward, 1000 * reward)]
    assert torch.equal(*alpha) and alpha[0].argmax() == 0 and alpha[0][0, 2] == alpha[0][0, 3]


def test_win_rate_interval_at_its_worst():
    """Catches a front page that hides the interval's worst case: 24 prompts of two kinds, won with
    a chance of .92 or .02, .85 on average, eight samples against eight."""
    rng, shape = numpy.random.default_rng(0), (3000, 24)
    chance = torch.from_numpy(numpy.where(rng.random(shape) < (0.85 - 0.02) / 0.9, 0.92, 0.02))
    ours, theirs = (torch.from_numpy(rng.standard_normal((*shape, 8))) for _ in range(2))
    ours += 2**0.5 * torch.special.ndtri(chance)[..., None]
    held = [low <= 0.85 <= high for a, b in zip(ours, theirs, strict=True)
            for _, (low, high) in [brain.win_rate(preference(a, b))]]
    assert 0.84 <= numpy.mean(held) <= 0.88, numpy.mean(held)


# ---- A recipe for TRL: the README's, skipped where TRL is not installed --------------------------

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL 1.16")

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


def recipe_text() -> str:
    """The recipe, as the README has it."""
    (block,) = re.findall(rf"^```python\n({re.escape(MARK)}\n.*?)^```$", README,
                          re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture(scope="module")
def trl_folder(tmp_path_factory):
    """A folder with the README's recipe.py, a tiny random GPT-NeoX, a tokenizer and 32 prompts."""
    folder, letters = tmp_path_factory.mktemp("trl"), "abcdefghijklmno"
    (folder / "recipe.py").write_text(recipe_text(), "utf-8")
    (folder / "probe.py").write_text(PROBE, "utf-8")
    tokenizer = word_tokenizer([EOS, *letters])
    tokenizer.save_pretrained(folder / "model")  # no pad token: TRL takes eos, as with Pythia
    build_model(vocab_size=16).save_pretrained(folder / "model")
    prompts = [" ".join(letters[(i * j + j * j) % 15] for j in range(2 + i % 4)) for i in range(60)]
    prompts = list(dict.fromkeys(prompts))[:32]  # of 2 to 5 tokens, no two alike
    assert len(prompts) == 32
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
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
    """Catches a recipe that has grown beyond what is read at a glance."""
    assert len(recipe_text().splitlines()) <= 60


@needs_trl
def test_recipe_learns_on_two_processes(trl_folder):
    """Catches a recipe that does not learn: the loss falls and the reward rises.

    BRAIn's loss jumps back to log n - H(alpha_hat) at each refresh, so it is compared at the same
    age, in two ways: over the steps that share one refresh's samples (the last against the first),
    and at age 0, at the refresh itself (the last quarter of the refreshes against the first). The
    reward is that of each refresh's new samples.
    """
    launch_trl(trl_folder, "recipe.py", output_dir="out")
    state = json.loads((trl_folder / f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
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


@torch.no_grad()
@needs_trl
def test_trainer_coefficients_are_those_of_snis_weights(trl_folder):
    """Catches a loss that the trainer scales, masks or feeds otherwise: minus its gradient is
    alpha_hat - beta_hat, recomputed from ids and weights."""
    kind = transformers.GPTNeoXForCausalLM
    launch_trl(trl_folder, "probe.py", output_dir="probe", max_steps=6)
    records = [torch.load(trl_folder / f"probe/rank{rank}.pt") for rank in (0, 1)]
    models = {}
    for name in ("prior", "proposal", "policy"):
        models[name] = kind.from_pretrained(trl_folder / "model")
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
        log_prob = {name: torch.stack([plain_score(model, list(prompt), response, TEMPERATURE)
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


# ---- The benchmark: `python test_brain.py bench --help` ------------------------------------------

# ------------------------------------------------------------------------------------------------


# One row per sample: what brain.py does not do, at its best: only response positions pass the head,
# no mask where lengths are equal.


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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as brain.Run does
        torch.manual_seed(0)
        config = transformers.GPTNeoXConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, intermediate_size=4 * args.hidden, num_labels=1,
            max_position_embeddings=args.prompt_tokens + args.response_tokens,
            bos_token_id=None, eos_token_id=None)  # nothing stops a response
        with torch.device(args.device):  # drawn where they live: a CPU takes a minute for 3 × 1B
            self.policy, self.prior = (
                transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
            self.reward_model = transformers.AutoModelForSequenceClassification.from_config(config)
        for model in (self.policy, self.prior, self.reward_model):  # heads in fp32, as in brain.py
            head = getattr(model, "score", None) or model.get_output_embeddings()
            head.forward = functools.partial(brain.exact_head, head.forward)
        for model in (self.prior, self.reward_model):  # frozen, their matrices in bf16 on CUDA
            brain.freeze(model.eval(), torch.bfloat16 if cuda else torch.float32)
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
        torch.use_deterministic_algorithms(self.args.device == "cuda")  # as run_losses
        brain.brain_loss(log_policy, now, now, reward, 1.0)[0].mean().backward()
        torch.use_deterministic_algorithms(False)
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


def test_rows_of_the_benchmark_are_right():
    """Catches a rival that is not the plain rows it is said to be, ragged or even."""
    model, judge, (prompts, responses) = build_model(), build_model(reward=True), make_ids(3)
    for xs, yss in ((prompts, responses), ([[1, 2], [3, 4]], [[[5, 0], [6, 7]], [[8, 0], [9, 9]]])):
        for found, score, of in ((plain_log_prob, plain_score, model),
                                 (plain_reward, own_head_reward, judge)):
            torch.testing.assert_close(found(of, xs, yss), table_of(score, of, xs, yss).float(),
                                       rtol=0, atol=1e-4)


def test_benchmark_runs(monkeypatch, capsys):
    """Catches a benchmark that nobody can repeat: its processes, its tables, its last line."""
    sizes = ("--hidden 16 --layers 1 --heads 2 --vocabulary 64 --prompt_tokens 9 --repeats 1 "
             "--response_tokens 5 --prompts 2 --threads 1 --device cpu --samples 2").split()
    process, commands = subprocess.check_output, []

    def peak(command):  # one in a process of its own, as all are where they count
        commands.append(command)
        return process(command) if len(commands) == 1 else b"1000"

    monkeypatch.setattr(subprocess, "check_output", peak)
    benchmark(sizes)
    assert [command[-3:] for command in commands] == [["--peak", name, "2"] for name in LAYOUTS]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["stage"] for row in found["rows"]] == ["sampling", "scoring", "reward", "step"]
    assert all(row["ratio"] == row["seconds_plain"] / row["seconds_packed"] > 0
               and row["limit"] == 2 * 14 / 19 for row in found["rows"])
    assert found["memory"][0]["n"] == 2 and found["memory"][0]["packed"] > 0
    assert found["log_prob_gap"] < 1e-3
    assert found["gradient_gap"] < 1e-5 and len(found["step_seconds"]["prompts at n 2"]) == 4


# ---- A whole step against TRL's: `python test_brain.py trl`, where TRL 1.16 is installed ---------


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
    n, B = args.samples[0], args.prompts
    tokenizer = word_tokenizer([chr(0x4E00 + i) for i in range(args.vocabulary)], letters=True)
    tokenizer.pad_token = chr(0x4E01)
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


# ---- The comparison: `python test_brain.py compare` (README, "Side by side") ---------------------

# Every method runs brain.py's own loop, on the same prior, reward model, prompts and number of
# samples; only `brain.policy_loss` is exchanged, and for DPO on the task's pairs `brain.sample`.


class Samples(NamedTuple):
    """What a loss may use of n responses to each of b prompts, (b, n); log-probabilities of whole
    responses in nats. In the field's notation π, π_ref, the π_old that sampled, r and |y|."""
    log_policy: Tensor
    log_prior: Tensor
    log_proposal: Tensor
    reward: Tensor
    length: Tensor


def family(s: Samples, kl_coef: float, **dials) -> Tensor:
    """BRAIn (Pandey et al. 2024) by default, KL(α̂ ‖ β̂); with its dials GDC++'s baseline (Korbak et
    al. 2022), DPG's none (Parshakova et al. 2019), and KL(β̂ ‖ α̂)."""
    return brain.brain_loss(*s[:4], kl_coef, **dials)[0]


def rloo(s: Samples, kl_coef: float) -> Tensor:
    """RLOO (Ahmadian et al. 2024): −1/n Σᵢ (Rᵢ − mean of the other R) log π(yᵢ), where R is
    r − kl_coef·log(π/π_ref)."""
    total, n = s.reward - kl_coef * (s.log_policy.detach() - s.log_prior), s.reward.shape[-1]
    advantage = (total - total.mean(-1, keepdim=True)) * n / (n - 1)  # as R less the others' mean
    return -(advantage * s.log_policy).mean(-1)


def ppo(s: Samples, kl_coef: float, clip: float = 0.2) -> Tensor:
    """PPO (Schulman et al. 2017; Stiennon et al. 2020), a response being one action and the group's
    mean the critic: −1/n Σᵢ min(ρᵢAᵢ, clip(ρᵢ)Aᵢ), where ρ = π/π_old, A = R − mean R, and R is
    r − kl_coef·log(π_old/π_ref)."""
    ratio = (s.log_policy - s.log_proposal).exp()
    total = s.reward - kl_coef * (s.log_proposal - s.log_prior)
    advantage = total - total.mean(-1, keepdim=True)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean(-1)


def best_and_worst(values: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """The values (b, n) of the responses of highest and of lowest reward, (b,) each; of one and
    the same response where all rewards are equal."""
    ends = torch.stack([reward.argmax(-1), reward.argmin(-1)], -1)  # (b, 2)
    return values.gather(-1, ends).unbind(-1)


def dpo(s: Samples, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023): −log σ(β·Δ log(π/π_ref)), chosen less rejected."""
    chosen, rejected = best_and_worst(s.log_policy - s.log_prior, s.reward)
    return -F.logsigmoid(beta * (chosen - rejected))


def slic(s: Samples, delta: float, weight: float = 0.1) -> Tensor:
    """SLiC-HF (Zhao et al. 2023): max(0, δ − log π(y⁺) + log π(y⁻)) − λ·log π(y⁺): the better
    sample stands for the reference."""
    better, worse = best_and_worst(s.log_policy, s.reward)
    return (delta - better + worse).clamp(min=0) - weight * better


def rrhf(s: Samples, _: float) -> Tensor:
    """RRHF (Yuan et al. 2023): Σ max(0, pᵢ − pⱼ) over rᵢ < rⱼ, p = log π(y)/|y|, − log π(best)."""
    mean = s.log_policy / s.length  # (b, n) p
    gap = (mean[:, :, None] - mean[:, None]).clamp(min=0)  # (b, n, n)
    wrong = gap.where(s.reward[:, :, None] < s.reward[:, None], 0)
    return wrong.sum((1, 2)) - best_and_worst(s.log_policy, s.reward)[0]


def best_of_n(s: Samples, _: float) -> Tensor:
    """Best-of-n fine-tuning (RAFT, Dong et al. 2023), of the prior's samples: −log π(best)."""
    return -best_and_worst(s.log_policy, s.reward)[0]


class Method(NamedTuple):
    """A loss, its dial's name and values (the first is tuned at), and who samples how many."""
    loss: object  # (Samples, strength) -> (b,)
    dial: str = "kl_coef"
    strengths: tuple = (0.4, 0.2, 0.8)  # several: ten seeds and a comparison; one: five seeds
    n: int = 8
    proposal: str = "lagged"
    refresh: int = 4  # steps between two samplings
    pairs: bool = False  # the task's own, instead of samples


BETA, PAIR = dict(dial="β", strengths=(0.3, 0.1, 1.0, 3.0)), dict(n=2, proposal="prior")
METHODS = {
    "BRAIn": Method(family),
    "offline BRAIn": Method(family, proposal="prior"),
    "unnormalized": Method(functools.partial(family, baseline="unnormalized"), strengths=(0.4,)),
    "none": Method(functools.partial(family, baseline="none")),
    "reverse": Method(functools.partial(family, divergence="reverse"), strengths=(0.4,)),
    "RLOO": Method(rloo, refresh=1),
    "PPO": Method(ppo),
    "DPO": Method(dpo, pairs=True, **BETA, **PAIR),
    "DPO-sft": Method(dpo, **BETA, **PAIR),
    "SLiC-HF": Method(slic, "δ", (1.0,), **PAIR),
    "RRHF": Method(rrhf, "", (0.0,), proposal="prior"),
    "best of n": Method(best_of_n, "", (0.0,), proposal="prior"),
}
MAIN = ("BRAIn", "DPO-sft", "RLOO", "PPO")  # of the chart
CRITERION = 0.4  # kl_coef of the tuning's criterion and of methods that have none themselves
TARGET_KL = 0.5  # nats, where true win rates are compared


@dataclass(frozen=True)
class Plan:
    """What to run, and where its results lie: one file a run, so that a killed sweep continues."""
    out: str
    methods: tuple = tuple(METHODS)
    seeds: int = 10
    jobs: int = 2
    tuning_seeds: int = 3
    rates: tuple = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    wider: int = 2  # more rates, by halves or doubles, while a method's best is the least or most
    steps: int = 100
    samples: int = 128  # responses a step
    due: tuple = (5, 10, 20, 30, 50, 75)  # steps after which a run is measured, beside its end
    validation: int = 8  # held-out prompts of the tuning, of seeds of its own
    prompts: int = 16  # other ones, of the figures
    strengths: int | None = None  # how many of a method's
    draws: int = 20_000  # of the table of estimators
    flags: tuple = ()  # of brain.py, for all runs and the models they share


class Job(NamedTuple):
    """One run. Tuning's are told by their seeds, which come from FIRST_TUNING_SEED on."""
    method: str
    strength: float
    lr: float
    seed: int

    @property
    def kl_coef(self) -> float:
        """Of the objective and the posterior that the run is measured by, in reward units a nat."""
        return self.strength if METHODS[self.method].dial == "kl_coef" else CRITERION


FIRST_TUNING_SEED = 100


# Exact figures: toy's responses are all ids but eos (0), up to three of them and eos, or four.


@torch.no_grad()
def exact_log_prob(model, prompts: list[list[int]], longest: int) -> Tensor:
    """log π of `response_space` after prompts of one length, (p, |Y|): the prefixes grow by a token
    at a time in a key-value cache, and each yields every next token."""
    size, cache = model.config.vocab_size, transformers.DynamicCache()
    tokens, prefix, parts = torch.tensor(prompts), torch.zeros(len(prompts), 1), []
    for k in range(longest):
        if k:
            cache.batch_repeat_interleave(size - 1)
            tokens = torch.arange(1, size).repeat(prefix.numel() // (size - 1))[:, None]
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].float()
        following = prefix[..., None] + logits.log_softmax(-1).view(*prefix.shape, size)
        parts.append(following[..., 0])  # eos
        prefix = following[..., 1:].flatten(1)  # (p, (size − 1)^(k + 1))
    return torch.cat([*parts, prefix], -1)


def true_worth(prompt: str, response: str) -> int:
    """The generator's own worth of a response: 2·(distinct key words listed) − (words)."""
    keys = set("sun moon star rain".split()) & set(prompt.split())
    return 2 * len(set(response.split()) & keys) - len(response.split())


def win_share(values: Tensor, weight: Tensor) -> Tensor:
    """The probability that a value (|Y|,) beats one drawn by weight (|Y|,), ties counting half."""
    levels, index = values.unique(return_inverse=True)
    mass = torch.zeros(len(levels), dtype=weight.dtype).index_add(0, index, weight)
    return (mass.cumsum(0) - mass / 2)[index]


@torch.no_grad()
def enumerate_responses(folder: Path, cfg, count: slice) -> dict:
    """What is known of all responses to some test prompts, (p, |Y|) float64 each: log prior,
    learned reward with its penalty, true worth, and who wins against a sample of the prior."""
    load = dict(prior=transformers.AutoModelForCausalLM,
                reward=transformers.AutoModelForSequenceClassification)
    prior, reward = (kind.from_pretrained(folder / name).eval() for name, kind in load.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "prior")
    texts = list(dict.fromkeys(e.prompt for e in brain.load_task(cfg, "test", tokenizer)))[count]
    prompts, longest = tokenizer(texts).input_ids, cfg.max_response_tokens
    space = list(map(list, response_space(prior.config.vocab_size, longest)))
    words = tokenizer.batch_decode(space, skip_special_tokens=True)
    unended = torch.tensor([float(y[-1] != 0) for y in space])
    scores = [brain.score_reward(reward, brain.pack([x], [space]))[0] for x in prompts]
    known = {"log_prior": exact_log_prob(prior, prompts, longest).double(),
             "reward": (torch.stack(scores) - cfg.missing_eos_penalty * unended).double(),
             "worth": torch.tensor([[true_worth(x, y) for y in words] for x in texts]).double()}
    assert (known["log_prior"].exp().sum(-1) - 1).abs().max() < 1e-4
    for judge, values in {"win_true": "worth", "win_reward": "reward"}.items():
        rows = zip(known[values], known["log_prior"].exp(), strict=True)
        known[judge] = torch.stack([win_share(*row) for row in rows])
    return known | {"prompts": prompts, "longest": longest}


def measure(known: dict, log_policy: Tensor, kl_coef: float) -> dict[str, float]:
    """Exact figures of a policy (p, |Y|), means over the prompts: E[r] and E[true worth], KL to
    the prior, the objective, KLs to kl_coef's posterior, and both judges' win rate to the prior."""
    log_policy, log_prior, reward = log_policy.double(), known["log_prior"], known["reward"]
    log_posterior = (log_prior + reward / kl_coef).log_softmax(-1)
    policy, ratio = log_policy.exp(), log_policy - log_posterior
    wanted = {key: known[key] for key in ("reward", "worth", "win_true", "win_reward")}
    wanted |= {"kl": log_policy - log_prior, "kl_reverse": ratio}
    found = {key: (policy * values).sum(-1).mean().item() for key, values in wanted.items()}
    forward = -(log_posterior.exp() * ratio).sum(-1).mean().item()
    return found | {"kl_forward": forward, "objective": found["reward"] - kl_coef * found["kl"]}


# One run: brain.main, with the loss exchanged and the policy measured on its way.


class Exchanged:
    """Takes the place of brain.policy_loss: the same log-probabilities and metrics, another loss.
    Before a step that is due it measures the policy, which is how it sees the course of a run."""

    def __init__(self, job: Job, known: dict | None = None, due: list[int] | None = None):
        self.job, self.known, self.due, self.seen = job, known, due, 0  # in samples
        self.inner, self.model, self.course = brain.policy_loss, None, []
        if known:
            start = measure(known, known["log_prior"], job.kl_coef)
            self.course.append({"samples": 0, **start})

    def look(self) -> None:
        """Adds the policy's exact figures to the course."""
        prompts, longest = self.known["prompts"], self.known["longest"]
        parts = [exact_log_prob(self.model, prompts[i : i + 4], longest)
                 for i in range(0, len(prompts), 4)]  # 4 at a time: the fastest, and 50 MB
        figures = measure(self.known, torch.cat(parts), self.job.kl_coef)
        self.course.append({"samples": self.seen, **figures})

    def __call__(self, cfg, model, batch):
        if self.due and self.seen >= self.due[0]:
            self.due = self.due[1:]
            self.look()
        self.model, self.seen = model, self.seen + batch.length.numel()
        log_policy, method = brain.sequence_log_prob(model, batch), METHODS[self.job.method]
        with pytest.MonkeyPatch.context() as patch:  # not computed twice
            patch.setattr(brain, "sequence_log_prob", lambda *_, **__: log_policy.detach())
            metrics = self.inner(cfg, model, batch)[1]
        known = [batch.scores[name] for name in ("log_prior", "log_proposal", "reward")]
        if method.pairs:  # people chose the first
            known[2] = torch.tensor([1.0, 0.0]).expand_as(log_policy)
        return method.loss(Samples(log_policy, *known, batch.length), self.job.strength), metrics


class OwnPairs:
    """Takes the place of brain.sample: a training prompt's chosen and rejected response."""

    def __init__(self, cfg, tokenizer):
        self.inner, self.pairs = brain.sample, {}
        for example in brain.load_task(cfg, "train", tokenizer):
            ids = tokenizer([example.prompt, example.chosen, example.rejected]).input_ids
            cut = [(y + [tokenizer.eos_token_id])[: cfg.max_comparison_tokens] for y in ids[1:]]
            self.pairs[tuple(ids[0])] = cut

    def __call__(self, model, prompts, n, *args, **options):
        pairs = [self.pairs.get(tuple(x)) for x in prompts]
        if None in pairs:  # of the evaluation
            return self.inner(model, prompts, n, *args, **options)
        return pairs, brain.sequence_log_prob(model, brain.pack(prompts, pairs))


def run_brain(flags: list[str]) -> tuple[int, str]:
    """brain.main's exit status, 0 or that of a guard, 1, and the last line it said, kept off the
    terminal; any other status ends the sweep."""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # brain.py's own exact KL would take half of the time; where it has no such part, no matter
        patch.setattr(brain, "enumerate_posterior", lambda *_: [], raising=False)
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        status = brain.main(["--task=toy", "--device=cpu", "--eval_samples=2", "--eval_prompts=3",
                             *flags])
    line = said.getvalue().strip().rpartition("\n")[2]
    if status not in (0, 1):
        raise KeyboardInterrupt if status == 130 else RuntimeError(f"{flags}: {line}")
    return status, line


def write_whole(path: Path, write) -> None:
    """The file as `write` makes it, under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def seed_folder(plan: Plan, seed: int) -> Path:
    """Where the models and the enumeration that a seed's runs share are."""
    return Path(plan.out, "seeds", str(seed))


def share_seed(plan: Plan, seed: int) -> str:
    """Trains the prior and the reward model of a seed, by brain.py, and lists all responses."""
    folder = seed_folder(plan, seed)
    if not (folder / "known.pt").exists():
        flags = [f"--seed={seed}", f"--out={folder}", "--steps=1", *plan.flags]
        status, said = run_brain(flags)
        if status:
            raise RuntimeError(f"seed {seed}: brain.py stopped with status {status}: {said}")
        tuned = slice(plan.validation), slice(plan.validation, plan.validation + plan.prompts)
        with contextlib.redirect_stdout(io.StringIO()):
            cfg = brain.parse_config(["--task=toy", *flags])
            known = enumerate_responses(folder, cfg, tuned[seed < FIRST_TUNING_SEED])
        write_whole(folder / "known.pt", functools.partial(torch.save, known))
    return f"seed {seed}: prior, reward model and enumeration"


def job_file(plan: Plan, job: Job) -> Path:
    """The file of a run's record."""
    return Path(plan.out, "runs", "{}-{:g}-{:g}-{}.json".format(*job).replace(" ", "_"))


def run_job(plan: Plan, job: Job) -> str:
    """A run and its record, if it is not there; a run that a guard stops is recorded as that."""
    path, began = job_file(plan, job), time.time()
    if not path.exists():
        work = train_dialogues if isinstance(plan, Dialogues) else train
        record = job._asdict() | work(plan, job) | {"seconds": time.time() - began}
        write_whole(path, lambda part: part.write_text(json.dumps(record) + "\n"))
    record = json.loads(path.read_text())
    said = record["said"] if record["status"] else "objective {objective:.3f}, KL {kl:.3f}".format(
        **record["course"][-1])
    return "{method} {strength:g}, rate {lr:g}, seed {seed}: {seconds:.1f} s, ".format(
        **record) + said


def job_flags(plan: Plan, job: Job) -> list[str]:
    """What brain.py is told of a job, but for its models, data and folder."""
    method = METHODS[job.method]
    prompts = plan.samples // method.n
    return [f"--seed={job.seed}", f"--steps={plan.steps}", f"--lr={job.lr}",
            f"--kl_coef={job.kl_coef}", f"--samples_per_prompt={method.n}",
            f"--proposal={method.proposal}", f"--prompts_per_step={prompts}",
            f"--prompts_per_refresh={method.refresh * prompts}", *plan.flags]


def train(plan: Plan, job: Job) -> dict:
    """Status, course and share of clipped steps of a run of brain.py with the job's loss."""
    folder, method = seed_folder(plan, job.seed), METHODS[job.method]
    last = plan.steps * plan.samples
    due = [] if job.seed >= FIRST_TUNING_SEED else [step * plan.samples for step in plan.due]
    watch = Exchanged(job, torch.load(folder / "known.pt"), [at for at in due if at < last])
    with tempfile.TemporaryDirectory() as out, pytest.MonkeyPatch.context() as patch:
        flags = [f"--prior={folder}/prior", f"--reward={folder}/reward", f"--out={out}/run",
                 *job_flags(plan, job)]
        patch.setattr(brain, "policy_loss", watch)
        if method.pairs:
            with contextlib.redirect_stdout(io.StringIO()):
                cfg = brain.parse_config(["--task=toy", *flags])
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "prior")
                patch.setattr(brain, "sample", OwnPairs(cfg, tokenizer))
        status, said = run_brain(flags)
        if not status:
            watch.look()
        if not math.isfinite(watch.course[-1]["objective"]):
            status, said = status or 1, said if status else "the policy is not finite"
        if status:
            return {"status": status, "said": said, "course": watch.course}
        norms = [line["gradient_norm"] for line in lines_of(Path(out, "run"))]
    limit = brain.parse_config(["--task=toy", *flags]).max_grad_norm
    clipped = statistics.fmean(norm > limit for norm in norms)
    return {"status": 0, "said": "", "course": watch.course, "clipped": clipped}


# The sweep: seeds, then the tuning, then the runs at the chosen rates.


def in_parallel(plan: Plan, work, items: list) -> None:
    """work(plan, item) for all, by so many processes, each told on stderr as it ends."""
    with contextlib.ExitStack() as stack:
        if plan.jobs == 1:
            said = (work(plan, item) for item in items)
        else:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(plan.jobs, context))
            stack.callback(pool.shutdown, cancel_futures=True)
            tasks = [pool.submit(work, plan, item) for item in items]
            said = (task.result() for task in as_completed(tasks))
        for i, line in enumerate(said, 1):
            print(f"{i}/{len(items)} {line}", file=sys.stderr, flush=True)


def records_of(plan: Plan, jobs: list[Job]) -> list[dict]:
    """The records of jobs, run as far as they have to be."""
    in_parallel(plan, run_job, [job for job in jobs if not job_file(plan, job).exists()])
    return [json.loads(job_file(plan, job).read_text()) for job in jobs]


def choose_rate(records: list[dict], name: str) -> dict:
    """A method's criterion by rate and tuning seed, None where the run was stopped, and the rate
    of the highest mean, a stopped run counting as −∞."""
    found = {}
    for record in sorted(records, key=lambda record: record["lr"]):
        if record["method"] == name:
            value = None if record["status"] else record["course"][-1]["objective"]
            found.setdefault(record["lr"], []).append(value)
    means = {rate: -math.inf if None in values else statistics.fmean(values)
             for rate, values in found.items()}
    return {"method": name, "chosen": max(means, key=means.get), "criterion": found}


def tune(plan: Plan, seeds: range) -> tuple[list[dict], list[dict]]:
    """A choose_rate of each method, and the tuning's records. Where the best rate is the least or
    the greatest, the grid goes on for that method."""
    rates, records = {name: plan.rates for name in plan.methods}, []
    for _ in range(1 + plan.wider):
        records += records_of(plan, [Job(name, METHODS[name].strengths[0], rate, seed)
                                     for seed in seeds for name in rates for rate in rates[name]])
        rows, rates = [choose_rate(records, name) for name in plan.methods], {}
        for row in rows:
            tried, best = list(row["criterion"]), row["chosen"]
            beyond = {tried[0]: best / 2, tried[-1]: best * 2}
            if best in beyond:
                rates[row["method"]] = (beyond[best],)
    return rows, records


def sweep(plan: Plan) -> tuple[list[dict], list[dict], list[dict]]:
    """The tuning's rows and all records, of the tuning and of the runs at the chosen rates."""
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + plan.tuning_seeds)
    share = share_dialogues if isinstance(plan, Dialogues) else share_seed
    in_parallel(plan, share, [*tuning, *range(plan.seeds)])
    rows, tried = tune(plan, tuning)
    chosen = {row["method"]: row["chosen"] for row in rows}
    return rows, tried, records_of(plan, [
        Job(name, strength, chosen[name], seed)
        for seed in range(plan.seeds) for name in plan.methods
        for strength in METHODS[name].strengths[: plan.strengths]
        if seed < 5 or len(METHODS[name].strengths) > 1])


# Statistics: the unit is a seed.


def t_tail(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's T: t = √freedom·tan θ makes its density cos θ to freedom − 1."""
    areas = []
    for start in (math.atan(t / math.sqrt(freedom)), 0.0):
        theta = torch.linspace(start, math.pi / 2, 20_001, dtype=torch.float64)
        areas.append(torch.trapezoid(theta.cos() ** (freedom - 1), theta).item())
    return areas[0] / areas[1]


@functools.lru_cache
def t_quantile(freedom: int) -> float:
    """The t that |T| exceeds in 5 % of cases, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 0.05 else (low, middle)
    return low


def interval(values: list[float]) -> list[float | None]:
    """Mean and half the width of its 95 % t interval; None where there are too few values."""
    if len(values) < 2:
        return [*values, None] if values else [None, None]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.fmean(values), t_quantile(len(values) - 1) * error]


def t_test(values: list[float]) -> float:
    """Two-sided p that the mean is 0; 1 for fewer than two values."""
    if len(values) < 2 or not any(values):
        return 1.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return t_tail(abs(statistics.fmean(values)) / error, len(values) - 1) if error else 0.0


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def samples_to(course: list[dict], level: float) -> float:
    """The samples after which the objective first is at a level that the course gets to, between
    two measurements linearly."""
    a, b = next((a, b) for a, b in itertools.pairwise(course) if b["objective"] >= level)
    share = (level - a["objective"]) / (b["objective"] - a["objective"])
    return a["samples"] + share * (b["samples"] - a["samples"])


def frontier(courses: list[list[dict]]) -> list[dict]:
    """The upper concave hull of learned reward over KL to the prior of all policies that a method
    was measured at, whatever the strength and the step, up to the highest reward. Between two of
    them a mixture (a draw from the one or the other) has the linear mean of every reward and win
    rate, and at most that of the KL. The truth has no say in the choice, as for a user."""
    hull = []
    for c in sorted((point for course in courses for point in course),
                    key=lambda point: (point["kl"], point["reward"])):
        while hull and (hull[-1]["kl"] == c["kl"] or len(hull) > 1 and (
                hull[-1]["reward"] <= at_kl([hull[-2], c], hull[-1]["kl"], "reward"))):
            hull.pop()  # it lies below the line from its neighbour to c
        hull.append(c)
    best = max(range(len(hull)), key=lambda i: hull[i]["reward"])
    return hull[: best + 1]


def at_kl(hull: list[dict], level: float, key: str) -> float:
    """`key` on a frontier, at a KL that it gets to."""
    for a, b in itertools.pairwise(hull):
        if level <= b["kl"]:
            return a[key] + (level - a["kl"]) / (b["kl"] - a["kl"]) * (b[key] - a[key])
    return hull[-1][key]


def frontiers(records: list[dict], method: str) -> dict[int, list[dict]]:
    """A method's frontier on each seed, over those of its runs that were not stopped."""
    found = {}
    for record in records:
        if record["method"] == method and not record["status"]:
            found.setdefault(record["seed"], []).append(record["course"])
    return {seed: frontier(courses) for seed, courses in found.items()}


def comparisons(plan: Plan, records: list[dict]) -> list[dict]:
    """BRAIn less each method with several strengths: the true win rate against the prior at a KL of
    TARGET_KL nats or the largest that both reach, paired over seeds; p adjusted over all rows.
    The reward model's win rate at the same points stands beside it."""
    rows, ours = [], frontiers(records, "BRAIn")
    for name in plan.methods if "BRAIn" in plan.methods else ():
        if name == "BRAIn" or len(METHODS[name].strengths) == 1:
            continue
        theirs = frontiers(records, name)
        seeds = sorted(ours.keys() & theirs.keys())
        levels = [min(TARGET_KL, ours[s][-1]["kl"], theirs[s][-1]["kl"]) for s in seeds]
        row = {"against": name, "seeds": len(seeds), "kl": interval(levels)[0],
               "kl_least": min(levels, default=None)}
        for judge in ("win_true", "win_reward"):
            wins = [[at_kl(of[s], level, judge) for s, level in zip(seeds, levels, strict=True)]
                    for of in (ours, theirs)]
            less = [a - b for a, b in zip(*wins, strict=True)]
            row[judge] = {"brain": interval(wins[0]), "other": interval(wins[1]),
                          "difference": interval(less), "p": t_test(less)}
        rows.append(row)
    for row, p in zip(rows, holm([row["win_true"]["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


FIGURES = ("reward", "kl", "kl_forward", "kl_reverse", "worth", "win_true", "win_reward", "clipped",
           "samples_90")


def end_figures(record: dict) -> dict:
    """A run's last figures, its share of clipped steps, and the samples to 90 % of its gain in the
    objective (None where it gained nothing)."""
    first, *_, last = record["course"]
    gain = last["objective"] - first["objective"]
    level = first["objective"] + 0.9 * gain
    return last | {"clipped": record["clipped"],
                   "samples_90": samples_to(record["course"], level) if gain > 0 else None}


def anchors(plan: Plan) -> list[dict]:
    """The prior's rows and the posteriors', which no method can leave and none can pass."""
    rows, known = [], [torch.load(seed_folder(plan, s) / "known.pt") for s in range(plan.seeds)]
    for kl_coef in sorted(METHODS["BRAIn"].strengths):
        log_posterior = [(k["log_prior"] + k["reward"] / kl_coef).log_softmax(-1) for k in known]
        found = [measure(k, q, kl_coef) for k, q in zip(known, log_posterior, strict=True)]
        rows.append(table_row("posterior", kl_coef, None, found, 0))
    found = [measure(k, k["log_prior"], CRITERION) for k in known]
    return [table_row("prior", CRITERION, None, found, 0), *rows]


def table_row(name: str, strength: float, lr: float | None, found: list[dict], failed: int) -> dict:
    """Mean and half interval of each of FIGURES over runs, less those that lack it."""
    row = {"method": name, "strength": strength, "lr": lr, "runs": len(found), "failed": failed}
    return row | {key: interval([f[key] for f in found if f.get(key) is not None])
                  for key in FIGURES}


def end_rows(plan: Plan, records: list[dict]) -> list[dict]:
    """A row of FIGURES at the end of the runs for each method and strength."""
    rows, keys = [], dict.fromkeys((r["method"], r["strength"], r["lr"]) for r in records)
    for name, strength, lr in sorted(keys, key=lambda key: (plan.methods.index(key[0]), key[1])):
        runs = [r for r in records if (r["method"], r["strength"]) == (name, strength)]
        fine = [end_figures(record) for record in runs if not record["status"]]
        rows.append(table_row(name, strength, lr, fine, len(runs) - len(fine)))
    return rows


# The gradient estimators at three fixed policies: 500 responses, every expectation known.


def gradient_errors(loss, log_prior: Tensor, log_posterior: Tensor, log_policy: Tensor,
                    log_proposal: Tensor, truth: Tensor, draws: int, n: int = 8) -> list[float]:
    """Bias and standard deviation, as norms, of a loss's gradient in the logits over Y, n samples
    a draw, kl_coef 1; all tensors (|Y|,)."""
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(log_proposal.exp(), draws * n, True, generator=generator).view(draws, n)
    leaf = log_policy[y].requires_grad_()
    known = [of[y] for of in (log_prior, log_proposal, log_posterior - log_prior)]
    value = loss(Samples(leaf, *known, torch.ones_like(leaf)), 1.0)
    c = torch.autograd.grad(value.sum(), leaf)[0]  # dloss / dlog π(y_i); log π = z − logsumexp z
    policy, total = log_policy.exp(), c.sum(-1, keepdim=True)
    mean = torch.zeros_like(policy).index_add(0, y.flatten(), c.flatten()) / draws
    mean -= policy * total.mean()
    # |g|² of g = Σᵢ cᵢ (e_yᵢ − policy): equal samples of a draw add up
    same = (y[:, :, None] == y[:, None]).double()
    square = torch.einsum("di,dij,dj->d", c, same, c) - 2 * total[:, 0] * (c * policy[y]).sum(-1)
    square += total[:, 0] ** 2 * policy.square().sum()
    variance = square.mean() - mean.square().sum()
    bias = (mean - truth).square().sum() - variance / draws  # the mean's own noise taken off
    return [part.clamp(min=0).sqrt().item() for part in (bias, variance)]


def estimator_table(draws: int) -> list[dict]:
    """gradient_errors of each method that estimates a KL's gradient, over that gradient's norm at
    the prior: KL(π ‖ posterior) for reverse and the policy gradients, KL(posterior ‖ π) for others.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 500, dtype=torch.float64, generator=generator)
    log_prior = (1.5 * noise[0]).log_softmax(-1)
    log_posterior = (log_prior + 1.4 * noise[1]).log_softmax(-1)
    half = ((log_prior + log_posterior) / 2 + 0.3 * noise[2]).log_softmax(-1)
    policies = {"prior": log_prior, "half way": half, "posterior": log_posterior}
    names = ("BRAIn", "offline BRAIn", "unnormalized", "none", "reverse", "RLOO", "PPO")
    rows = []
    for name in names:
        method, reverse, scale = METHODS[name], name in ("reverse", "RLOO", "PPO"), None
        for where, log_policy in policies.items():
            ratio = log_policy - log_posterior
            truth = log_policy.exp() - log_posterior.exp()
            if reverse:
                truth = log_policy.exp() * (ratio - (log_policy.exp() * ratio).sum())
            scale = scale or truth.norm().item()  # at the prior, the first
            lagged = (log_policy + 0.3 * noise[3]).log_softmax(-1)  # it has moved by 0.3 since
            proposal = log_prior if method.proposal == "prior" else lagged
            proposal = log_policy if method.refresh == 1 else proposal
            bias, sd = gradient_errors(method.loss, log_prior, log_posterior, log_policy, proposal,
                                       truth, draws)
            rows.append({"method": name, "policy": where, "divergence": "reverse" if reverse else
                         "forward", "bias": bias / scale, "sd": sd / scale})
    return rows


# What is printed.


def cell(found: list[float | None], digits: int = 3) -> str:
    """A mean and half its interval."""
    return " ± ".join(f"{value:.{digits}f}" for value in found if value is not None) or "–"


def print_table(title: str, head: list[str], rows: list[list]) -> None:
    """A Markdown table under its title."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def print_frontier(plan: Plan, records: list[dict], points: int = 9) -> None:
    """The true worth against the KL to the prior of the main methods, as Mermaid, on an even grid
    that ends at the largest KL that all of them reach on every seed."""
    lines = {name: frontiers(records, name) for name in MAIN if name in plan.methods}
    seeds = set.intersection(*(set(of) for of in lines.values())) if lines else set()
    if not seeds:
        return
    top = min(of[seed][-1]["kl"] for of in lines.values() for seed in seeds)
    grid = [top * i / (points - 1) for i in range(points)]
    colors = dict(zip(lines, ("#d62728", "#1f77b4", "#2ca02c", "#9467bd"), strict=False))
    order = "first red, then blue, green, purple"
    print(f"\nTrue worth (mean) against KL to the prior; the lines in order, {order}: "
          f"{', '.join(lines)}.\n\n```mermaid")
    palette = json.dumps({"themeVariables": {"xyChart": {
        "plotColorPalette": ", ".join(colors.values())}}})
    print(f"%%{{init: {palette}}}%%\nxychart-beta")
    print(f'    title "True worth against KL to the prior"\n    x-axis "KL, nats" '
          f'[{", ".join(f"{level:.2f}" for level in grid)}]\n    y-axis "worth"')
    for of in lines.values():
        means = [statistics.fmean(at_kl(of[seed], level, "worth") for seed in seeds)
                 for level in grid]
        print(f"    line [{', '.join(f'{mean:.3f}' for mean in means)}]")
    print("```")


def rounded(value):
    """Numbers of a JSON object to six digits, whatever they are nested in."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def compare(plan: Plan) -> dict:
    """Runs what is missing, prints every table, and returns the figures."""
    tuned, tried, records = sweep(plan)
    result = {"plan": vars(plan), "tuning": tuned, "ends": anchors(plan) + end_rows(plan, records),
              "comparisons": comparisons(plan, records), "estimators": estimator_table(plan.draws),
              "stopped": [{key: r[key] for key in (*Job._fields, "said")}
                          for r in tried + records if r["status"]],
              "seconds": sum(r["seconds"] for r in tried + records)}
    print_tuning(plan, tuned,
                 f"Tuning: exact E[r] − {CRITERION}·KL on {plan.validation} validation prompts")
    print_table(
        f"At the end: mean ± half a 95 % t interval over runs, {plan.prompts} held-out prompts, "
        f"all exact. Posterior: of kl_coef, and of kl_coef {CRITERION} where a method has none. "
        "Win rates against the prior, ties half: the true judge prefers the higher worth. The gain "
        "is in E[r] − kl_coef·KL.",
        ["method", "dial", "rate", "runs", "stopped", "E[r]", "KL to prior",
         "KL(posterior ‖ policy)", "KL(policy ‖ posterior)", "true worth", "true win rate",
         "reward model's win rate", "clipped steps", "samples to 90 % of its gain"],
        [[row["method"], dial_text(row), "–" if row["lr"] is None else f"{row['lr']:g}",
          row["runs"], row["failed"],
          *(cell(row[key], 0 if key == "samples_90" else 3) for key in FIGURES)]
         for row in result["ends"]])
    print_equal_kl("True win rate", result["comparisons"])
    places = dict.fromkeys(row["policy"] for row in result["estimators"])
    by_method = {row["method"]: row["divergence"] for row in result["estimators"]}
    print_table(
        "Gradient estimators at three fixed policies, n = 8: bias and s.d., as norms over the true "
        "gradient's at the prior. Lagged proposals have moved by 0.3 nats (s.d.).",
        ["method", "estimates KL", *(f"{where}: {what}" for where in places
                                     for what in ("bias", "s.d."))],
        [[name, divergence, *(f"{row[key]:.3f}" for row in result["estimators"]
                              if row["method"] == name for key in ("bias", "sd"))]
         for name, divergence in by_method.items()])
    print_frontier(plan, records)
    print_table("Stopped by a guard of brain.py.", [*Job._fields, "said"],
                [list(row.values()) for row in result["stopped"]])
    print(json.dumps(rounded(result)))
    return result


def print_tuning(plan: Plan, tuned: list[dict], title: str) -> None:
    """A row of the criterion at each rate for each method."""
    rates = sorted({rate for row in tuned for rate in row["criterion"]})
    print_table(
        f"{title}, mean over tuning seeds ({plan.tuning_seeds}); the chosen rate in bold. Where it "
        "was the least or the greatest of the grid, the grid went on.",
        ["method", *(f"{rate:g}" for rate in rates)],
        [[row["method"], *(criterion_text(row, rate) for rate in rates)] for row in tuned])


def print_equal_kl(title: str, rows: list[dict]) -> None:
    """`comparisons`, a row each."""
    print_table(
        f"{title} against the prior at a KL of {TARGET_KL} nats, or the largest that both "
        "reach: BRAIn less the other, paired over seeds, 95 % t interval; p after Holm over all "
        "rows. A method's frontier: the concave hull of learned reward over KL of all policies "
        "measured, of every strength and step, linear in between, as mixtures are.",
        ["against", "seeds", "at KL", "least", "BRAIn", "other", "difference", "p", "p, Holm", "so",
         "difference by the reward model"],
        [[row["against"], row["seeds"], cell([row["kl"]]), cell([row["kl_least"]]),
          *(cell(row["win_true"][key]) for key in ("brain", "other", "difference")),
          f"{row['win_true']['p']:.2g}", f"{row['p_holm']:.2g}", verdict(row),
          cell(row["win_reward"]["difference"])] for row in rows])


def criterion_text(row: dict, rate: float) -> str:
    """The tuning's mean criterion at a rate, bold where it was chosen."""
    values = row["criterion"].get(rate)
    if not values or None in values:
        return "stopped" if values else ""
    return ("**{:.3f}**" if rate == row["chosen"] else "{:.3f}").format(statistics.fmean(values))


def dial_text(row: dict) -> str:
    """A method's dial and its value."""
    dial = METHODS[row["method"]].dial if row["method"] in METHODS else "kl_coef"
    return f"{dial} {row['strength']:g}" if dial else "–"


def verdict(row: dict) -> str:
    """What a comparison says at 5 % after Holm."""
    if row["p_holm"] >= 0.05:
        return "undecided"
    return "BRAIn" if row["win_true"]["difference"][0] > 0 else row["against"]


def print_comparison(argv: list[str]) -> None:
    """The whole comparison; the last line is a JSON object with every figure."""
    parser = argparse.ArgumentParser(prog="test_brain.py compare")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="of the runs after tuning")
    parser.add_argument("--methods", default=",".join(METHODS), help="names between commas")
    parser.add_argument("--out", default="out/compare", help="a file a run; a killed sweep goes on")
    parser.add_argument("--jobs", type=int, default=Plan.jobs, help="processes, of a thread each")
    args = parser.parse_args(argv)
    args.methods = tuple(args.methods.split(","))
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    compare(Plan(**vars(args)))


# The same in small on dialogues, `python test_brain.py compare_hh DIR`: half of HH's pairs train
# the reward model, the other half a judge of their own.


@dataclass(frozen=True)
class Dialogues(Plan):
    """A comparison on HH's files, less what only toy can be asked."""
    data_dir: str = ""
    methods: tuple = ("BRAIn", "RLOO", "DPO-sft")
    seeds: int = 3
    tuning_seeds: int = 1
    rates: tuple = (5e-4, 1e-3, 2e-3)
    wider: int = 1
    strengths: int | None = 1
    steps: int = 50
    hidden: int = 128  # of a GPT-NeoX with random weights and four layers
    words: int = 2048  # of its tokenizer
    flags: tuple = (
        "--max_prompt_tokens=128", "--max_response_tokens=32", "--max_comparison_tokens=64",
        "--missing_eos_penalty=0", "--sft_lr=1e-3", "--sft_batch=16", "--sft_epochs=4",
        "--reward_lr=5e-4", "--reward_batch=16", "--reward_epochs=3", "--eval_prompts=128",
        "--eval_samples=4")


def share_dialogues(plan: Dialogues, seed: int) -> str:
    """Trains the prior of a seed and the reward model of one half of the pairs, and on the other
    half a judge, by brain.py: into policy/ and judge/ of the seed's folder."""
    folder = seed_folder(plan, seed)
    if not (folder / "judge/result.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            cfg = brain.parse_config(["--task=hh", "--base=base", f"--data_dir={plan.data_dir}",
                                      "--hh_subsets", "harmless-base", *plan.flags])
            rows = {split: [row for row in brain.read_examples(cfg, split) if row]
                    for split in ("train", "test")}
        texts = [text for row in rows["train"] for text in row]
        tokenizer = build_tokenizer(texts=texts, size=plan.words)
        config = build_config(
            vocab_size=plan.words, hidden_size=plan.hidden, intermediate_size=4 * plan.hidden,
            num_hidden_layers=4, max_position_embeddings=512)
        write_checkpoint(folder / "base", config, tokenizer, seed=seed)
        random.Random(seed).shuffle(rows["train"])
        given = {"policy": [f"--base={folder}/base"], "judge": [f"--prior={folder}/policy/prior"]}
        for half, (name, flags) in enumerate(given.items()):
            for split, found in {"train": rows["train"][half::2], "test": rows["test"]}.items():
                write_lines(folder / f"{name}_data/{split}.jsonl", [x._asdict() for x in found])
            status, said = run_brain(["--task=jsonl", f"--data_dir={folder}/{name}_data", *flags,
                                      f"--seed={seed}", f"--out={folder}/{name}", "--steps=1",
                                      "--prompts_per_step=2", "--prompts_per_refresh=2",
                                      *plan.flags])
            if status:
                raise RuntimeError(f"seed {seed}: brain.py stopped with status {status}: {said}")
    return f"seed {seed}: prior, reward model and judge"


@torch.no_grad()
def ordered_right(plan: Dialogues, seed: int, name: str) -> float:
    """The share of held-out pairs that the reward model of policy/ or judge/ orders right."""
    folder, flags = seed_folder(plan, seed), ["--task=jsonl", "--prior=x", *plan.flags]
    cfg = brain.parse_config([*flags, f"--data_dir={folder}/{name}_data"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / name / "reward").eval()
    with contextlib.redirect_stdout(io.StringIO()):
        rows = brain.load_task(cfg, "test", tokenizer)[: cfg.eval_prompts]
    run = SimpleNamespace(cfg=cfg, tokenizer=tokenizer, device="cpu")
    batches = brain.text_batches(run, rows, ("chosen", "rejected"), cfg.max_comparison_tokens)
    rewards = torch.cat([brain.score_reward(model, batch) for batch in batches])
    return (rewards[:, 0] > rewards[:, 1]).float().mean().item()


def train_dialogues(plan: Dialogues, job: Job) -> dict:
    """Status and course (its start and its end) of a run of brain.py with the job's loss. In the
    place of toy's truth stands the judge, who reads texts."""
    folder, run = seed_folder(plan, job.seed), Path(plan.out, "run", *map(str, job))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, "policy_loss", Exchanged(job))
        status, said = run_brain([
            "--task=jsonl", f"--prior={folder}/policy/prior", f"--reward={folder}/policy/reward",
            f"--data_dir={folder}/policy_data", f"--out={run}", *job_flags(plan, job)])
    if status:
        return {"status": status, "said": said, "course": []}
    end = json.loads((run / "result.json").read_text())
    norms = [line["gradient_norm"] for line in lines_of(run)]

    kind = transformers.AutoModelForSequenceClassification
    judge = kind.from_pretrained(folder / "judge/reward").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "judge/reward")
    judged = {"prior": [], "policy": []}
    rows = map(json.loads, (run / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    for row in (row for row in rows if row["model"] in judged):
        x = tokenizer(row["prompt"]).input_ids
        ys = brain.encode_responses(tokenizer, row["responses"], 512)
        with torch.no_grad():
            judged[row["model"]].append(brain.score_reward(judge, brain.pack([x], [ys]))[0])
    wins = preference(torch.stack(judged["policy"]), torch.stack(judged["prior"]))
    course = [
        {"samples": 0, "reward": end["reward_prior"], "kl": 0.0, "win_true": 0.5,
         "win_reward": 0.5},
        {"samples": plan.steps * plan.samples, "reward": end["reward_policy"],
         "kl": end["kl_to_prior"], "win_true": wins.mean().item(),
         "win_reward": end["win_rate_vs_prior"]}]
    for point in course:
        point["objective"] = point["reward"] - job.kl_coef * point["kl"]
    return {"status": 0, "said": "", "course": course,
            "clipped": statistics.fmean(norm > 1 for norm in norms)}


def compare_dialogues(plan: Dialogues) -> dict:
    """Runs what is missing, prints every table, and returns the figures."""
    tuned, tried, records = sweep(plan)
    right = {name: [ordered_right(plan, seed, name) for seed in range(plan.seeds)]
             for name in ("policy", "judge")}
    result = {"plan": vars(plan), "ordered_right": right, "tuning": tuned,
              "ends": end_rows(plan, records), "comparisons": comparisons(plan, records),
              "seconds": sum(r["seconds"] for r in tried + records)}
    print("\nHeld-out pairs ordered right: by the reward model {}, by the judge {}.".format(
        *(cell(interval(values)) for values in right.values())))
    print_tuning(plan, tuned, f"Tuning: E[r] − {CRITERION}·KL on held-out prompts")
    print_table(
        "At the end: mean ± half a 95 % t interval over seeds.",
        ["method", "dial", "rate", "runs", "stopped", "E[r]", "KL to prior", "judge's win rate",
         "reward model's win rate", "clipped steps"],
        [[row["method"], dial_text(row), f"{row['lr']:g}", row["runs"], row["failed"],
          *(cell(row[key]) for key in ("reward", "kl", "win_true", "win_reward", "clipped"))]
         for row in result["ends"]])
    print_equal_kl("The judge's win rate", result["comparisons"])
    print(json.dumps(rounded(result)))
    return result


def print_dialogues(argv: list[str]) -> None:
    """The comparison on dialogues; the last line is a JSON object with every figure."""
    parser = argparse.ArgumentParser(prog="test_brain.py compare_hh")
    parser.add_argument("data_dir", help="as for --task hh; harmless-base is read")
    parser.add_argument("--seeds", type=int, default=Dialogues.seeds)
    parser.add_argument("--out", default="out/compare_hh", help="a file a run; it can be continued")
    parser.add_argument("--jobs", type=int, default=Plan.jobs, help="processes, of a thread each")
    compare_dialogues(Dialogues(**vars(parser.parse_args(argv))))


def test_compared_losses():
    """Catches a method that is not its paper's: value and gradient of each loss, worked out by hand
    for n = 3, kl_coef = β = δ = 2."""
    policy = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    known = [torch.tensor([row], dtype=torch.float64) for row in (
        [-2, -2, -2], [-1, -3, -2], [1, 0, 2], [1, 4, 2])]  # prior, proposal, reward, length
    a = [math.exp(x) for x in (-0.5, 1, 1)]  # log prior + r/2 − log proposal
    w = [1, math.e, 1 / math.e]  # exp(ρ), ρ = 0, 1, −1
    a, b = ([x / sum(xs) for x in xs] for xs in (a, w))
    none = sum(x * (math.log(3 * x) - rho) for x, rho in zip(a, (0, 1, -1), strict=True))
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]  # log β̂/α̂
    back = sum(y * x for x, y in zip(logs, b, strict=True))
    kl = (-sum(x * y for x, y in zip(logs, a, strict=True)),
          [y - x for x, y in zip(a, b, strict=True)])
    want = {
        "BRAIn": kl, "offline BRAIn": kl, "none": (none, [-x for x in a]),
        "unnormalized": (none + sum(w) / 3 - 1, [y / 3 - x for x, y in zip(a, w, strict=True)]),
        "reverse": (back, [y * (x - back) for x, y in zip(logs, b, strict=True)]),
        # R = r − 2(log π − log π_ref) = −1, 0, 4; the others' means 2, 1.5, −0.5
        "RLOO": (-(-3 * -1 + -1.5 * -2 + 4.5 * -3) / 3, [3 / 3, 1.5 / 3, -4.5 / 3]),
        # R = r − 2(log π_old − log π_ref) = −1, 2, 2, less 1; ratios 1, e, 1/e, clipped 1, 1.2, 0.8
        "PPO": (-(1 * -2 + 1.2 * 1 + 1 / math.e * 1) / 3, [2 / 3, 0, -1 / math.e / 3]),
        # the third is chosen, the second rejected: Δ log(π/π_ref) = −1 − 0, times 2
        "DPO": (math.log(1 + math.exp(2)), [0, 2 / (1 + math.exp(-2)), -2 / (1 + math.exp(-2))]),
        "SLiC-HF": (2 + 3 - 2 + 0.1 * 3, [0, 1, -1 - 0.1]),
        # p = −1, −1/2, −3/2; wrong pairs: second over first, second and first over third
        "RRHF": (0.5 + 1 + 0.5 + 3, [-1 + 1, 1 / 4 + 1 / 4, -1 / 2 - 1 / 2 - 1]),
        "best of n": (3, [0, 0, -1])}
    want["DPO-sft"] = want["DPO"]
    assert want.keys() == METHODS.keys()
    for name, (value, slope) in want.items():
        leaf = policy.clone().requires_grad_()
        loss = METHODS[name].loss(Samples(leaf, *known), 2.0)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0][0].tolist()
        assert loss.tolist() == pytest.approx([value], abs=1e-12), name
        assert gradient == pytest.approx(slope, abs=1e-12), name


def test_compared_losses_at_ties_and_margins():
    """Catches a hinge that pulls beyond its margin, and a pair of equal rewards that teaches."""
    leaf = torch.tensor([[-1.0, -9.0]], requires_grad=True)
    for reward, loss, want in (([1, 0], slic, [-0.1, 0]), ([1, 1], dpo, [0, 0]),
                               ([1, 0], rrhf, [-1, 0]), ([1, 1], rrhf, [-1, 0])):
        known = [torch.tensor([row]) for row in ([-2.0, -2.0], [-2.0, -2.0], reward, [1, 1])]
        value = loss(Samples(leaf, *known), 2.0)
        assert torch.autograd.grad(value.sum(), leaf)[0][0].tolist() == pytest.approx(want)


def test_exact_log_prob():
    """Catches an enumeration out of order, incomplete, or unlike brain.py's own score."""
    model, prompts = build_model(vocab_size=4), [[1, 2, 3], [3, 3, 0]]
    space = list(map(list, response_space(4, 3)))
    found = exact_log_prob(model, prompts, 3)
    with torch.no_grad():
        want = brain.sequence_log_prob(model, brain.pack(prompts, [space, space]))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))


def test_true_worth():
    """Catches a judge that is not the generator's: with it, toy's noisy pairs are labelled right
    at the rate σ(2Δ) that the generator's own worth gives, and σ(Δ) or 1 is far off."""
    assert true_worth("the sun of moon a in TL;DR:", "sun sun star moon") == 2 * 2 - 4
    cfg, tokenizer = brain.parse_config([]), word_tokenizer(["?"])
    right, expected = [], []
    for example in brain.load_task(cfg, "train", tokenizer):
        good, bad = (true_worth(example.prompt, y) for y in (example.chosen, example.rejected))
        if good != bad:
            right.append(good > bad)
            expected.append(1 / (1 + math.exp(-2 * abs(good - bad))))
    error = math.sqrt(sum(p * (1 - p) for p in expected)) / len(expected)
    assert len(right) > 1000
    assert abs(statistics.fmean(right) - statistics.fmean(expected)) < 3 * error


def test_measure():
    """Catches a figure that is not what its name says, for three responses worked out by hand."""
    rows = dict(log_prior=[0.5, 0.25, 0.25], reward=[0.0, 1.0, 1.0], worth=[0.0, 2.0, 1.0])
    known = {key: torch.tensor([row]).double() for key, row in rows.items()}
    known["win_true"] = win_share(known["worth"][0], known["log_prior"][0])[None]
    known["win_reward"] = win_share(known["reward"][0], known["log_prior"][0])[None]
    assert known["win_true"].tolist() == [[0.25, 0.875, 0.625]]
    assert known["win_reward"].tolist() == [[0.25, 0.75, 0.75]]
    known["log_prior"] = known["log_prior"].log()
    policy = [0.25, 0.5, 0.25]
    z = 0.5 + 0.5 * math.exp(2)  # of p·exp(r/0.5)
    posterior = [0.5 / z, 0.25 * math.exp(2) / z, 0.25 * math.exp(2) / z]
    want = {"reward": 0.75, "worth": 1.25, "win_true": 0.0625 + 0.4375 + 0.15625,
            "win_reward": 0.0625 + 0.375 + 0.1875, "kl": 0.25 * math.log(2),
            "kl_reverse": sum(q * math.log(q / p) for p, q in zip(posterior, policy, strict=True)),
            "kl_forward": sum(p * math.log(p / q) for p, q in zip(posterior, policy, strict=True)),
            "objective": 0.75 - 0.5 * 0.25 * math.log(2)}
    assert measure(known, torch.tensor([policy]).double().log(), 0.5) == pytest.approx(want)


def test_statistics_of_the_comparison():
    """Catches a wrong quantile, p-value, adjustment or interpolation."""
    assert t_quantile(9) == pytest.approx(2.262157, abs=1e-5)
    assert t_quantile(1) == pytest.approx(12.7062, abs=1e-3)
    assert t_tail(2.776445, 4) == pytest.approx(0.05, abs=1e-6)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx([2.0, 4.302653 / math.sqrt(3)], abs=1e-5)
    assert t_test([1.0, 2.0, 3.0]) == pytest.approx(0.0741799, abs=1e-6)
    assert (interval([]), interval([2.0])) == ([None, None], [2.0, None])
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    course = [dict(objective=y, samples=10 * i) for i, y in enumerate((0, 2, 1, 4))]
    assert [samples_to(course, level) for level in (0, 1.5, 3)] == pytest.approx(
        [0, 7.5, 20 + 20 / 3])


def test_frontier():
    """Catches a frontier that takes in what lies below it, or goes on where reward only falls."""
    names = "kl", "reward", "worth"
    courses = [[dict(zip(names, row, strict=True)) for row in rows] for rows in (
        [(0, 0, 5), (1, 1, 6), (0.5, 3, 7), (2, 4, 9)], [(0, 0, 5), (1.5, 3.5, 1), (3, 3.9, 1)])]
    hull = frontier(courses)
    assert [point["kl"] for point in hull] == [0, 0.5, 2]
    assert [at_kl(hull, level, "worth") for level in (0, 0.25, 1.25, 2)] == [5, 6, 8, 9]
    assert at_kl(frontier([courses[0][:1]]), 0, "worth") == 5


def test_comparison_of_records(capsys):
    """Catches a primary figure that is not paired, not at one KL, or silent about stopped runs."""
    records, plan = [], Plan(out="", methods=("BRAIn", "RLOO", "DPO"), seeds=4)
    for seed in range(4):
        for name, gain, top in (("BRAIn", 0.3, 2.0), ("RLOO", 0.2, 0.4), ("DPO", 0.3, 2.0)):
            win = 0.5 + gain * top + 0.01 * seed * (name == "DPO")
            end = {key: top for key in ("kl", "reward", "worth", "objective", "samples")}
            course = [dict.fromkeys(end, 0.0) | {"win_true": 0.5, "win_reward": 0.5},
                      end | {"win_true": win + 0.001 * seed, "win_reward": win}]
            records.append(dict(method=name, strength=0.4, lr=1.0, seed=seed, course=course,
                                clipped=0.0, status=int(name == "DPO" and seed == 3), said="NaN"))
    rloo_row, dpo_row = comparisons(plan, records)
    assert (rloo_row["seeds"], dpo_row["seeds"]) == (4, 3)
    assert rloo_row["kl"] == pytest.approx(0.4) and dpo_row["kl"] == dpo_row["kl_least"] == 0.5
    assert rloo_row["win_true"]["difference"][0] == pytest.approx(0.04 - 0.0012, abs=1e-9)
    assert dpo_row["win_true"]["difference"][0] == pytest.approx(-0.0025)
    assert verdict(rloo_row) == "BRAIn" and verdict(dpo_row) == "undecided"
    assert [row["failed"] for row in end_rows(plan, records)] == [0, 0, 1]
    print_frontier(plan, records, 3)
    assert "line [0.000, 0.200, 0.400]" in capsys.readouterr().out


def test_wider_tuning(monkeypatch):
    """Catches a rate chosen at the grid's edge, and one chosen though a run of it was stopped."""
    best = {"BRAIn": 3e-4, "RLOO": 2e-3}

    def records(plan, jobs):
        return [job._asdict() | dict(status=int(job.method == "RLOO" and job.lr > 2e-3), course=[
            dict(objective=-abs(math.log(job.lr / best[job.method])))]) for job in jobs]

    monkeypatch.setattr(sys.modules[__name__], "records_of", records)
    rows, tried = tune(Plan(out="", methods=tuple(best)), range(2))
    assert [row["chosen"] for row in rows] == [2.5e-4, 2e-3]
    assert list(rows[0]["criterion"]) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert rows[1]["criterion"][4e-3] == [None, None] and len(tried) == 2 * (5 + 5 + 1 + 1)


SHORT_PLAN = dict(
    seeds=1, methods=("BRAIn", "best of n"), tuning_seeds=1, rates=(2e-3,), wider=0, steps=6,
    samples=16, due=(2,), validation=1, prompts=1, jobs=1, draws=500, flags=(
        "--sft_epochs=1", "--sft_batch=256", "--reward_epochs=1", "--reward_batch=256"))


@pytest.fixture(scope="module")
def compared(beside):
    """The plan of a comparison in small, its models and runs in its folder, and what it said."""
    return Plan(out=f"{beside[1]}/compared", **SHORT_PLAN), said_beside(beside, "compared")


def test_compare_runs(compared, monkeypatch):
    """Catches a comparison that nobody can repeat: its tables, its last line, its resumption, and
    a diverging run that takes the sweep with it or is kept secret."""
    plan, said = compared
    last = json.loads(said.splitlines()[-1])
    assert [row["method"] for row in last["ends"]] == (
        ["prior"] + 3 * ["posterior"] + 3 * ["BRAIn"] + ["best of n"])
    assert all(row["win_reward"][0] > 0.5 for row in last["ends"][1:4])
    assert len(list(Path(plan.out, "runs").iterdir())) == (1 + 3) + (1 + 1) and not last["stopped"]
    began = []
    monkeypatch.setattr(sys.modules[__name__], "train", lambda _, job: began.append(job) or {
        "status": 1, "said": "NaN", "course": []})
    lost = Job("best of n", 0.0, 2e-3, 0)
    job_file(plan, lost).unlink()
    with contextlib.redirect_stdout(io.StringIO()) as again:
        assert [r["seed"] for r in compare(plan)["stopped"]] == [0]
    assert began == [lost] and "| best of n | 0.0 | 0.002 | 0 | NaN |" in again.getvalue()


def test_diverging_run_is_recorded(compared):
    """Catches a run that brain.py's guard stops and the harness does not survive."""
    found = train(compared[0], Job("BRAIn", 0.4, 1e9, 0))
    assert found["status"] == 1 and "finite" in found["said"] and found["course"]


def test_exchange_changes_the_loss_alone(compared, tmp_path, monkeypatch):
    """Catches a harness that changes more than the loss: with BRAIn's own, every number of a run is
    that of brain.py without it."""
    lines, kept = [], brain.policy_loss
    known = torch.load(seed_folder(compared[0], 0) / "known.pt")
    watch = Exchanged(Job("BRAIn", 0.4, 2e-3, 0), known, [16])
    for i, loss in enumerate((kept, watch)):
        monkeypatch.setattr(brain, "policy_loss", loss)
        out, folder = tmp_path / str(i), seed_folder(compared[0], 0)
        assert run_brain([f"--prior={folder}/prior", f"--reward={folder}/reward", f"--out={out}",
                          "--steps=3", "--prompts_per_step=2", "--prompts_per_refresh=4"])[0] == 0
        lines.append(metrics_of(out))
    assert lines[0] == lines[1] and len(lines[0]) == 3
    assert [point["samples"] for point in watch.course] == [0, 16]


def test_own_pairs(compared):
    """Catches pairs that are not the task's, labelled by the reward model, or scored otherwise, and
    a run on them that brain.py's guards stop."""
    assert train(compared[0], Job("DPO", 0.3, 2e-3, 0))["status"] == 0
    folder = seed_folder(compared[0], 0)
    cfg = brain.parse_config(["--seed=0"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "prior")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "prior").eval()
    pairs, example = OwnPairs(cfg, tokenizer), brain.load_task(cfg, "train", tokenizer)[-1]
    prompt = tokenizer(example.prompt).input_ids
    (ids,), log_q = pairs(model, [prompt], 2, 4, eos_id=0)
    texts = [example.chosen.split(), example.rejected.split()]
    words = [" ".join([*text, "<eos>"][:4]) for text in texts]
    assert [tokenizer.decode(y) for y in ids] == words
    batch = brain.pack([prompt], [ids])
    torch.testing.assert_close(log_q, brain.sequence_log_prob(model, batch))
    batch.scores.update({name: torch.zeros(1, 2) for name in (
        "log_prior", "log_proposal", "raw_reward", "eos_share", "response_tokens")})
    batch.scores["reward"] = torch.tensor([[0.0, 9.0]])
    known = torch.load(folder / "known.pt")
    loss, _ = Exchanged(Job("DPO", 0.3, 1.0, 0), known, [])(cfg, model, batch)
    gap = 0.3 * (log_q[0, 0] - log_q[0, 1]).item()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-gap)), abs=1e-5)


SHORT_DIALOGUES = dict(
    methods=("reverse",), seeds=1, rates=(1e-3,), wider=0, steps=2, samples=8, jobs=1, hidden=16,
    words=300, flags=(
        "--max_prompt_tokens=256", "--max_response_tokens=4", "--max_comparison_tokens=16",
        "--sft_epochs=1", "--reward_epochs=1", "--reward_lr=1e-2", "--eval_prompts=8"))
FEW_DIALOGUES = {"train": [make_dialogue(i) for i in range(48)],
                 "test": [make_dialogue(200 + i) for i in range(8)]}


@pytest.fixture(scope="module")
def conversed(beside):
    """The same of a comparison on dialogues."""
    plan = Dialogues(out=f"{beside[1]}/conversed", data_dir=f"{beside[1]}/hh", **SHORT_DIALOGUES)
    return plan, said_beside(beside, "conversed")


def test_compare_dialogues(conversed, monkeypatch):
    """Catches halves that share a pair, a judge that saw the training's, figures of another model
    or of other samples, and runs that are done twice."""
    (plan, said), rows = conversed, FEW_DIALOGUES
    with contextlib.redirect_stdout(io.StringIO()) as again, monkeypatch.context() as patch:
        patch.setattr(brain, "main", None)
        compare_dialogues(plan)
    assert again.getvalue().splitlines()[-1] == said.splitlines()[-1]  # from its files
    assert "| reverse | kl_coef 0.4 | 0.001 | 1 | 0 |" in said

    halves = [[tuple(json.loads(line).values()) for line in open(path, encoding="utf-8")]
              for path in sorted(Path(plan.out).glob("seeds/0/*_data/train.jsonl"))]
    assert [len(half) for half in halves] == [24, 24]
    assert set().union(*halves) == {split_dialogue(row) for row in rows["train"]}
    folder, run = seed_folder(plan, 0), Path(plan.out, "run/reverse/0.4/0.001/0")
    told = json.loads((folder / "judge/result.json").read_text())["config"]
    assert told["prior"] == f"{folder}/policy/prior" and told["data_dir"] == f"{folder}/judge_data"

    kind = transformers.AutoModelForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    wins = {}
    for judge in ("policy", "judge"):
        model, rewards = kind.from_pretrained(folder / judge / "reward").eval(), {}
        for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            x, *ys = tokenizer([row["prompt"], *(y.removesuffix(EOS) for y in row["responses"])],
                               ).input_ids
            with torch.no_grad():
                rewards.setdefault(row["model"], []).append(
                    [plain_reward(model, [x], [[[*y, 0]]]).item() for y in ys])
        ours, theirs = (torch.tensor(rewards[name]) for name in ("policy", "prior"))
        pairs = (ours[:, :, None] - theirs[:, None]).sign()
        wins[judge] = (0.5 + pairs.mean() / 2).item()
    record = json.loads(job_file(plan, Job("reverse", 0.4, 1e-3, 0)).read_text())
    start, end = record["course"]
    result = json.loads((run / "result.json").read_text())
    assert end["win_true"] == pytest.approx(wins["judge"], abs=1e-6)
    assert end["win_true"] != pytest.approx(wins["policy"], abs=1e-6)
    assert end["win_reward"] == result["win_rate_vs_prior"] and start["win_true"] == 0.5
    assert end["objective"] == result["reward_policy"] - 0.4 * result["kl_to_prior"]
    assert ordered_right(plan, 0, "judge") in [i / 8 for i in range(9)]


# ---- Robustness: what testing from outside found -------------------------------------------------

REWARD_FILES = {  # FILE.py by name: what is in it
    "nothing": "score = 1\n", "number": "reward = 1\n", "syntax": "def reward(:\n",
    "missing": "import no_such_module_at_all\n", "null": "reward = len\0\n",
    "leaves": "import sys\nsys.exit()\n",
    "short": "def reward(p, r, f):\n    return [1.0] * (len(r) - 1)\n",
    "long": "def reward(p, r, f):\n    return [1.0] * (len(r) + 1)\n",
    "nan": "def reward(p, r, f):\n    return [float('nan')] * len(r)\n",
    "inf": "def reward(p, r, f):\n    return [float('inf')] * len(r)\n",
    "raises": "def reward(p, r, f):\n    raise KeyError('no\\nsuch answer')\n",
    "words": "def reward(p, r, f):\n    return ['1.0'] * len(r)\n",
    "none": "def reward(p, r, f):\n    pass\n", "scalar": "def reward(p, r, f):\n    return 1.0\n",
    "lists": "def reward(p, r, f):\n    return [[1.0, 2.0]] * len(r)\n",
    "two": "def reward(p, r):\n    return [1.0] * len(r)\n",
    "fine": "def reward(prompts, responses, references):\n    return [len(r) for r in responses]\n",
}


def write_checkpoint(folder: Path, config, tokenizer=None, reward=False, seed=0, **labels) -> None:
    """A random model of any config, with large weights, and a tokenizer."""
    torch.manual_seed(seed)
    kind = (transformers.AutoModelForSequenceClassification if reward else
            transformers.AutoModelForCausalLM)
    if reward:
        config.num_labels = 1
    kind.from_config(config).save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)


def edit_config(folder: Path, **changes) -> None:
    """Overwrite fields of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def rack(shelf, tmp_path_factory) -> dict[str, str]:
    """The shelf and more: files that give rewards, unusual checkpoints, folders of others."""
    root = tmp_path_factory.mktemp("rack")
    for name, text in REWARD_FILES.items():
        (root / f"r_{name}.py").write_text(text)
    (root / "r_folder.py").mkdir()
    good = json.dumps(GOOD_ROWS["jsonl"]) + "\n"
    for name, line in {
            "null": '{"prompt": null, "reference": "a"}', "only_rejected":
            '{"prompt": "why", "rejected": "yes"}', "quoted": '"why"', "false":
            '{"prompt": "why", "reference": false}', "twice": good.strip() * 2, "void": ""}.items():
        write_lines(root / name / "test.jsonl", [GOOD_ROWS["jsonl"]] * 3)
        (root / name / "train.jsonl").write_text(good + line + "\n")
    write_lines(root / "void/test.jsonl", [GOOD_ROWS["jsonl"]] * 2)
    for name in ("fifo", "folder"):
        write_lines(root / name / "test.jsonl", [GOOD_ROWS["jsonl"]] * 3)
    os.mkfifo(root / "fifo/train.jsonl")
    (root / "folder/train.jsonl").mkdir()
    write_gz(root / "hh_junk/harmless-base/train.jsonl.gz", [GOOD_ROWS["hh"]])
    path = root / "hh_junk/harmless-base/train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:20] + b"\x00\xff" * 40)
    post = GOOD_ROWS["posts"]
    for name, row in {"tldr_blank": {**post, "summary": " "}, "tldr_number": {**post, "post": 3}
                      }.items():
        for split in ("train", "test"):
            write_lines(root / name / f"datasets/tldr_3_filtered/{split}.jsonl", [row] * 3)

    shared = dict(vocab_size=416, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=64, max_position_embeddings=640, initializer_range=0.3,
                  bos_token_id=0, eos_token_id=0, pad_token_id=None)
    neo = transformers.GPTNeoConfig(
        vocab_size=416, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=4, intermediate_size=64, max_position_embeddings=640, window_size=40,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
                rope_theta=10000.0, original_max_position_embeddings=40)
    phi = transformers.Phi3Config(**shared, num_key_value_heads=4, rope_parameters=rope,
                                  original_max_position_embeddings=40)
    mistral = transformers.MistralConfig(**shared, num_key_value_heads=2, sliding_window=40)
    mamba = transformers.MambaConfig(vocab_size=416, hidden_size=32, num_hidden_layers=1,
                                     state_size=4, eos_token_id=0, bos_token_id=0)
    bloom = transformers.BloomConfig(vocab_size=416, hidden_size=32, n_layer=1, n_head=4)
    codegen = transformers.CodeGenConfig(vocab_size=416, n_embd=32, n_layer=1, n_head=4,
                                         rotary_dim=4, n_positions=640, bos_token_id=0,
                                         eos_token_id=0)
    ctrl = transformers.CTRLConfig(vocab_size=416, n_embd=32, dff=64, n_layer=1, n_head=4,
                                   n_positions=640)
    for name, config in {"neo": neo, "mistral": mistral, "phi": phi, "mamba": mamba, "bloom": bloom,
                         "codegen": codegen, "ctrl": ctrl}.items():
        write_checkpoint(root / name, config)
    write_checkpoint(root / "neo_reward", neo, reward=True)
    write_checkpoint(root / "tied_reward", build_config("gpt2"), reward=True)
    edit_config(root / "tied_reward", architectures=["GPT2LMHeadModel"])
    roberta = transformers.RobertaConfig(**shared | dict(pad_token_id=1, num_hidden_layers=1,
                                                         max_position_embeddings=66))
    own = build_tokenizer(bos=True)
    write_checkpoint(root / "no_pad", copy.deepcopy(roberta), own, reward=True)
    own.pad_token, own.model_max_length = "<s>", 10**30
    write_checkpoint(root / "roberta", roberta, own, reward=True)
    other = build_tokenizer(bos=True)
    other.eos_token = None
    write_checkpoint(root / "other_no_eos", build_config(), other, reward=True)

    for name in ("layers", "lora", "text_size", "heads", "no_context", "nan", "appends", "many",
                 "byt5", "own_run", "foreign", "unknown_stage", "half_state"):
        shutil.copytree(shelf["prior"], root / name)
    edit_config(root / "layers", num_hidden_layers=1)
    edit_config(root / "text_size", hidden_size="32")
    edit_config(root / "heads", num_attention_heads=5)
    edit_config(root / "many", num_hidden_layers=-1)
    edit_config(root / "no_context", max_position_embeddings=None)
    weights = safetensors.torch.load_file(root / "lora/model.safetensors")
    safetensors.torch.save_file(weights | {"gpt_neox.lora_A.weight": torch.ones(2)},
                                root / "lora/model.safetensors", {"format": "pt"})
    name = next(iter(weights))
    safetensors.torch.save_file(weights | {name: weights[name] * math.nan},
                                root / "nan/model.safetensors", {"format": "pt"})
    ending = build_tokenizer()
    ending.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 0)])
    ending.save_pretrained(root / "appends")
    for path in (root / "byt5").glob("tokenizer*"):
        path.unlink()
    transformers.ByT5Tokenizer().save_pretrained(root / "byt5")
    torch.save({"weights": torch.ones(2)}, root / "foreign/state.pt")
    (root / "half_state/state.pt").write_bytes(b"PK\x03\x04")
    state = {"stage": "warmup", "step": 0, "metrics": "", "threads": 1}
    cfg = dataclasses.asdict(brain.parse_config(["--device", "cpu"]))
    torch.save(state | {"config": cfg}, root / "unknown_stage/state.pt")
    (root / "link").symlink_to(shelf["prior"])
    return shelf | {path.name.removesuffix(".py"): str(path) for path in root.iterdir()}


RUN = f"{JSONL} --prior {{prior}} --data_dir {{data}}"
MORE_BAD_INPUTS = [
    # flags
    ("empty out", "--out ''", "--out is empty"),
    ("empty prior", f"{JSONL} --prior '' --data_dir {{data}}", "--prior is empty"),
    ("empty base", "--base ''", "--base is empty"),
    ("empty reward", "--reward ''", "--reward is empty"),
    ("empty data_dir", f"{JSONL} --prior {{prior}} --data_dir ''", "--data_dir is empty"),
    ("kl_coef 1e300", "--kl_coef 1e300", r"--kl_coef.*1e9, not 1e\+300"),
    ("seed 2**63", f"--seed {2**63}", "--seed must be between 0 and 1e9"),
    ("4e9 prompts a refresh", "--prompts_per_refresh 4000000000", "--prompts_per_refresh must be"),
    ("lr 0", "--lr 0", "--lr must be"), ("lr below 0", "--lr=-1e-3", "--lr must be"),
    ("temperature nan", "--temperature nan", "--temperature must be"),
    ("no limit of the gradient", "--max_grad_norm 0", "--max_grad_norm"),
    ("infinite penalty", "--missing_eos_penalty inf", "--missing_eos_penalty"),
    ("two held-out prompts", "--eval_prompts 2", "--eval_prompts.*3"),
    ("save never", "--save_every 0", "--save_every.*1"),
    ("no tokens a pass", "--micro_batch_tokens 0", "--micro_batch_tokens.*1"),
    ("no response", "--max_response_tokens 0", "--max_response_tokens.*1"),
    ("unknown device", "--device tpu", "--device.*tpu"),
    ("no subset", "--task hh --prior x --hh_subsets", "--hh_subsets"),
    ("tldr with a base alone", "--task tldr --base {prior} --device cpu --max_prompt_tokens 300 "
     "--max_comparison_tokens 64 --max_response_tokens 8 --data_dir {tldr}",
     "no row with a chosen text.*--reward"),
    # the folder
    ("prior is out", f"{RUN} --out {{prior}}", "--prior lies inside"),
    ("base is out", f"{JSONL} --base {{prior}} --data_dir {{data}} --out {{prior}}",
     "--base lies inside"),
    ("prior is out by a link", f"{RUN} --out {{link}} --overwrite", "--prior lies inside"),
    ("prior below out", f"{RUN} --out {{root}} --overwrite", "--prior lies inside"),
    ("reward is out", f"{RUN} --reward {{reward}} --out {{reward}}", "--reward lies inside"),
    ("data is out", f"{RUN} --out {{data}} --overwrite", "--data_dir lies inside"),
    ("out holds another's files", f"{RUN} --out {{own_run}}", "holds no run.*--overwrite"),
    ("out holds another's state", f"{RUN} --out {{foreign}}", "cannot be continued.*--overwrite"),
    ("out holds half a state", f"{RUN} --out {{half_state}}", "cannot be continued.*--overwrite"),
    ("out's stage is unknown", "--device cpu --out {unknown_stage}", "unknown_stage/prior"),
    # rewards of FILE.py
    ("reward file absent", f"{RUN} --reward {{root}}/none.py", r"none\.py.*No such file"),
    ("reward file is a folder", f"{RUN} --reward {{r_folder}}", r"r_folder\.py"),
    ("reward file without reward", f"{RUN} --reward {{r_nothing}}", r"r_nothing\.py.*no reward\("),
    ("reward is a number", f"{RUN} --reward {{r_number}}", r"r_number\.py.*no reward\("),
    ("reward file: syntax", f"{RUN} --reward {{r_syntax}}", r"r_syntax\.py: invalid syntax"),
    ("reward file: import", f"{RUN} --reward {{r_missing}}", "r_missing.*no_such_module"),
    ("reward file: a null byte", f"{RUN} --reward {{r_null}}", r"r_null\.py.*null byte"),
    ("reward: too few", f"{RUN} --reward {{r_short}}",
     r"2 responses need 2 .* not \[1\.0\]"),
    ("reward: too many", f"{RUN} --reward {{r_long}}",
     r"2 responses need 2 .* not \[(1\.0, ){2}1\.0\]"),
    ("reward: an exception", f"{RUN} --reward {{r_raises}}", "reward of texts: .*no.*such answer"),
    ("reward: words", f"{RUN} --reward {{r_words}}", "reward of texts: .*'str'"),
    ("reward: nothing", f"{RUN} --reward {{r_none}}", "reward of texts: .*None"),
    ("reward: one number", f"{RUN} --reward {{r_scalar}}", "reward of texts: .*float"),
    ("reward: lists", f"{RUN} --reward {{r_lists}}", "reward of texts: .*list"),
    ("reward: two arguments", f"{RUN} --reward {{r_two}}", "reward of texts: .*argument"),
    # data
    ("data is a pipe", f"{JSONL} {BOTH} --data_dir {{fifo}}", r"fifo/train\.jsonl: there is no"),
    ("data is a folder", f"{JSONL} {BOTH} --data_dir {{folder}}", r"train\.jsonl: there is no"),
    ("prompt is null", f"{JSONL} {BOTH} --data_dir {{null}}", r"train\.jsonl:2: .*prompt"),
    ("rejected without chosen", f"{JSONL} {BOTH} --data_dir {{only_rejected}}",
     r"train\.jsonl:2: .*chosen"),
    ("row is a text", f"{JSONL} {BOTH} --data_dir {{quoted}}", r"train\.jsonl:2: .*object"),
    ("reference is false", f"{JSONL} {BOTH} --data_dir {{false}}", r"train\.jsonl:2: .*reference"),
    ("two rows on a line", f"{JSONL} {BOTH} --data_dir {{twice}}", r"train\.jsonl:2: Extra data"),
    ("two test rows", f"{JSONL} {BOTH} --data_dir {{void}}", "jsonl test: 2 of 2 rows"),
    ("junk in a gz", f"--task hh --hh_subsets harmless-base {BOTH} {LIMITS} --data_dir {{hh_junk}}",
     r"train\.jsonl\.gz"),
    ("blank summaries", f"--task tldr --device cpu {BOTH} {LIMITS} --data_dir {{tldr_blank}}",
     "train: 0 of 3 rows.*broken"),
    ("post is a number", f"--task tldr --device cpu {BOTH} {LIMITS} --data_dir {{tldr_number}}",
     r"train\.jsonl:1: .*post"),
    # checkpoints: silent wrong results, or tracebacks, of old
    ("window of columns, prior", f"{JSONL} --data_dir {{data}} --prior {{neo}} --reward {{reward}}",
     "gpt_neo models cannot"),
    ("window of columns, reward", f"{JSONL} --data_dir {{data}} --prior {{prior}} "
     "--reward {neo_reward}", "gpt_neo models cannot"),
    ("window of columns, passed in the evaluation alone", "--task jsonl --device cpu --data_dir "
     "{data} --prior {prior} --reward {neo_reward} --samples_per_prompt 2 --max_prompt_tokens 24 "
     "--max_response_tokens 6 --max_comparison_tokens 6", "gpt_neo models cannot"),
    ("window of columns, odd n", "--task jsonl --device cpu --data_dir {data} --prior {prior} "
     "--reward {neo_reward} --samples_per_prompt 3 --max_prompt_tokens 24 --max_response_tokens 6 "
     "--max_comparison_tokens 6", "gpt_neo models cannot"),
    ("sliding window", "--task jsonl --device cpu --data_dir {data} --prior {mistral} "
     "--max_prompt_tokens 31 --max_response_tokens 8 --max_comparison_tokens 64", "mistral.* 40:"),
    ("longrope", f"{JSONL} --prior {{phi}} --data_dir {{data}}", "phi3.*context is 40: lower"),
    ("no attention", f"{JSONL} --prior {{mamba}} --data_dir {{data}}", "mamba models cannot"),
    ("ALiBi", f"{JSONL} --prior {{bloom}} --data_dir {{data}}", "bloom models cannot"),
    ("no such head", f"{JSONL} --base {{codegen}} --data_dir {{data}}", "codegen.*--reward"),
    ("a head that is no score", f"{JSONL} --base {{ctrl}} --data_dir {{data}}", "ctrl.*--reward"),
    ("tied reward model as prior", f"{JSONL} --prior {{tied_reward}} --data_dir {{data}}",
     "tied_reward.*score"),
    ("fewer layers than weights", f"{JSONL} --prior {{layers}} --data_dir {{data}}",
     "layers.*stray"),
    ("stray adapter", f"{JSONL} --prior {{lora}} --data_dir {{data}}", "lora.*stray"),
    ("size is a text", f"{JSONL} --prior {{text_size}} --data_dir {{data}}", "text_size"),
    ("heads do not divide", f"{JSONL} --prior {{heads}} --data_dir {{data}}", "heads"),
    ("layers below 0", f"{JSONL} --prior {{many}} --data_dir {{data}}", "many"),
    ("context is null", f"{JSONL} --prior {{no_context}} --data_dir {{data}}", "no_context"),
    ("weights are nan", f"{JSONL} --prior {{nan}} --data_dir {{data}}", "nan off plain rows"),
    ("tokenizer that ends prompts", f"{JSONL} --prior {{appends}} --data_dir {{data}}",
     "appends.*after a prompt"),
    ("ByT5's tokenizer", f"{JSONL} --prior {{byt5}} --data_dir {{data}}", "byt5.*after a prompt"),
    ("encoder without pad", f"{RUN} --reward {{no_pad}}", "no_pad does not read.*FILE.py"),
    ("encoder over its positions", f"{RUN} --reward {{roberta}}", "roberta does not read"),
    ("decoder of other tokens without eos", f"{RUN} --reward {{other_no_eos}}", "no_eos.*eos"),
    ("reward offline", f"{RUN} --reward nobody/nothing-at-all", "nobody/nothing"),
    ("reward is a data file", f"{RUN} --reward {{data}}/train.jsonl", r"train\.jsonl"),
    ("reward without weights", f"{RUN} --reward {{no_weights}}", "no_weights"),
]


@pytest.mark.parametrize("what, command, says", MORE_BAD_INPUTS,
                         ids=[case[0] for case in MORE_BAD_INPUTS])
def test_more_bad_input(what, command, says, rack, tmp_path, capfd, monkeypatch):
    """Catches a traceback, a hang or silence for what users and their files get wrong, and a folder
    of theirs that is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def files():
        return {path: path.stat().st_size for folder in ("own_run", "foreign", "prior", "data")
                for path in Path(rack[folder]).rglob("*") if path.name != "lock"}

    before = files()
    error = refused(capfd, shlex.split(command.format_map(rack)))
    assert re.search(says, error), error
    assert all(path.name == "lock" for path in tmp_path.rglob("*") if path.is_file())
    assert files() == before, "another's folder is left alone"


def test_bad_inputs_are_many():
    """Catches a table that shrinks, and two cases of one name."""
    names = [case[0] for case in BAD_INPUTS + MORE_BAD_INPUTS]
    assert len(names) == len(set(names)) >= 115


# -- Results that were wrong in silence ------------------------------------------------------------


def test_the_policy_generates_as_it_was_trained(shelf, tmp_path):
    """Catches a prior's own settings of `generate` kept in policy/, and a policy without a padding
    token, which cannot generate for two prompts at once."""
    prior = tmp_path / "prior"
    shutil.copytree(shelf["prior"], prior)
    (prior / "generation_config.json").write_text(json.dumps(
        dict(repetition_penalty=1.3, min_p=0.2, num_beams=4, top_k=7, eos_token_id=5)))
    run = launch(tmp_path / "run", task="jsonl", prior=prior, reward=shelf["reward"], steps=1,
                 data_dir=shelf["data"], temperature=0.7, prompts_per_refresh=4)
    assert run.status == 0, run.stderr
    kept = json.loads((run.folder / "policy/generation_config.json").read_text())
    kept = {key: value for key, value in kept.items() if key[0] != "_" and value is not None}
    kept.pop("transformers_version")
    assert kept == dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, eos_token_id=0,
                        pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder / "policy")
    both = tokenizer([" the cat", " so"], padding=True, return_tensors="pt")
    assert model.generate(**both, max_new_tokens=2).shape[0] == 2


def test_one_end_of_text():
    """Catches a text that ends in the eos string encoded with two, and one that is cut with one."""
    tokenizer = build_tokenizer()
    plain, ended, cut = brain.encode_responses(
        tokenizer, [" so be it", f" so be it{EOS}", " so be it . no"],
        len(tokenizer(" so be it").input_ids) + 1)
    assert plain == ended and plain.count(0) == 1 and plain[-1] == 0
    assert cut[: len(plain) - 1] == plain[:-1] and 0 not in cut


def rewarder(source, prior):
    """Run's part that load_reward reads: the prior's tokenizer on a CPU."""
    cfg = brain.Config(max_prompt_tokens=16, max_response_tokens=8, samples_per_prompt=4)
    run = SimpleNamespace(cfg=cfg, device="cpu", dtype=torch.float32, tokenizer=build_tokenizer())
    return brain.load_reward(run, str(source), prior)


@pytest.mark.parametrize("difference", ["nothing", "eos", "bos", "embeddings"])
def test_a_reward_model_reads_ids_only_if_they_are_its_own(difference, tmp_path):
    """Catches the prior's ids read by a reward model with its vocabulary but another eos, another
    encoding of a text, or fewer embeddings than the prior can sample ids."""
    fewer = dict(vocab_size=400) if difference == "embeddings" else {}
    save_checkpoint(tmp_path, reward=True, **fewer)
    tokenizer = build_tokenizer()
    if difference == "eos":
        tokenizer.eos_token = "!"
    if difference == "bos":
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer.save_pretrained(tmp_path)
    if difference != "nothing":
        with pytest.raises(brain.Stop, match="does not read the prior's tokens.*FILE.py"):
            rewarder(tmp_path, build_model())
        return
    reward = rewarder(tmp_path, build_model())
    x, y = " can you say why", " it was up"
    batch = brain.pack(build_tokenizer()([x]).input_ids,
                       [[[*build_tokenizer()(y).input_ids, 0]] * 2])
    batch.examples.append(brain.Example(x))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = [*tokenizer(x).input_ids, *tokenizer(y, add_special_tokens=False).input_ids,
           tokenizer.eos_token_id]
    with torch.no_grad():
        want = model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])
    torch.testing.assert_close(reward(batch), want.expand(1, 2).to(reward(batch)), rtol=0,
                               atol=1e-4)


@pytest.mark.parametrize("reward", ["r_nan", "r_inf"])
def test_a_reward_file_that_is_not_finite(reward, rack, capfd):
    """Catches a reward of FILE.py that is no number, found hours later."""
    error = refused(capfd, [*shlex.split(RUN.format_map(rack)), "--reward", rack[reward]], status=1)
    assert "a reward is not finite; prompt" in error


def test_equal_ids_tie(monkeypatch, unbroken):
    """Catches rounding that decides between two equal responses, which are a twentieth of all."""
    real, count = brain.judge, itertools.count()

    def judge(run, batch):  # as if a score depended on its place
        real(run, batch)
        noise = torch.rand(batch.scores["reward"].shape, generator=brain.make_generator(
            "noise", next(count)))
        batch.scores["reward"] += 1e-6 * noise

    monkeypatch.setattr(brain, "judge", judge)
    prior = transformers.AutoModelForCausalLM.from_pretrained(unbroken.folder / "prior")
    run = fake_run(unbroken.folder, eval_samples=8)
    examples = brain.load_task(run.cfg, "test", run.tokenizer)[:16]
    rows, samples = brain.evaluate(run, {"prior": prior, "policy": prior}, examples)
    found = {}
    for sample in samples:
        for text, reward in zip(sample["responses"], sample["rewards"], strict=True):
            found.setdefault((sample["prompt"], text), set()).add(reward)
    assert len(found) < 16 * 16 and all(len(rewards) == 1 for rewards in found.values())


def test_references_decide_between_equal_prompts(rack, tmp_path):
    """Catches a reward of FILE.py that is taken from another row with the same prompt."""
    (tmp_path / "r.py").write_text("def reward(p, y, references): return map(len, references)")
    rows = [{"prompt": " why ?", "reference": " no" * i} for i in range(1, 5)]
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    run = launch(tmp_path / "run", task="jsonl", prior=rack["prior"], reward=tmp_path / "r.py",
                 data_dir=tmp_path, steps=1, prompts_per_refresh=4, missing_eos_penalty=0,
                 max_response_tokens=1, temperature=0.01)
    assert run.status == 0, run.stderr
    assert len({x for line in run.samples("policy") for x in line["responses"]}) == 1
    assert sorted(x for line in run.samples("policy") for x in line["rewards"]) == [
        3, 3, 6, 6, 9, 9, 12, 12]


def fake_run(folder: Path, **changes):
    """What evaluation and sampling read of a Run, around the prior and reward model of a run."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "prior")
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    cfg = dataclasses.replace(brain.parse_config([*SMALL, "x"]), **changes)
    run = SimpleNamespace(
        cfg=cfg, tokenizer=tokenizer, device="cpu", dtype=torch.float32, clock={}, where="test",
        autocast=contextlib.nullcontext, require=lambda fine, what, batch: None,
        reward=functools.partial(brain.score_reward, reward.eval()))
    return run


@pytest.fixture(scope="module")
def half_run(brief, tmp_path_factory) -> Path:
    """The folder of such a run that was stopped after four of its eight steps."""
    out, real = tmp_path_factory.mktemp("half") / "run", brain.Run.save

    def save(run, stage, step, **parts):
        real(run, stage, step, **parts)
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain.Run, "save", save)
        assert brain.main([*SMALL, str(out), *brief]) == 130
    return out


def test_the_number_of_threads_is_kept(brief, half_run, brief_run, tmp_path):
    """Catches a run that continues with another number of threads, whose sums are others."""
    out = tmp_path / "run"
    shutil.copytree(half_run, out)
    torch.set_num_threads(2)
    try:
        assert brain.main([*SMALL, str(out), *brief]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert fingerprint(out) == fingerprint(brief_run)


# -- Lost data: a folder is one run's --------------------------------------------------------------


def snapshot(folder: Path) -> dict:
    """Every file below a folder but the lock, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("content", [
    "prior/config.json", "policy/model.safetensors", "report.md", "notes.txt", "config.json"])
def test_a_folder_of_somebody_elses(content, brief, tmp_path, capfd):
    """Catches a run that writes over files it did not make, and --overwrite that takes more than
    this program's names."""
    out = tmp_path / "own"
    (out / content).parent.mkdir(parents=True)
    (out / content).write_text("mine")
    assert "--overwrite" in refused(capfd, [*SMALL, str(out), *brief])
    assert snapshot(out) == {content: b"mine"}
    if content in ("notes.txt", "report.md"):
        assert brain.main([*SMALL, str(out), *brief, "--steps", "2", "--overwrite"]) == 0
        assert (snapshot(out).get(content) == b"mine") == (content == "notes.txt")


@pytest.mark.parametrize("what", ["deleted", "foreign", "text"])
def test_a_finished_run_without_its_state(what, brief, brief_run, tmp_path, capfd):
    """Catches a finished run that is replaced because its state.pt is gone or another's."""
    out = tmp_path / "run"
    shutil.copytree(brief_run, out)
    (out / "state.pt").unlink()
    if what == "foreign":
        torch.save({"epoch": 3}, out / "state.pt")
    elif what == "text":
        (out / "state.pt").write_text("state")
    (out / "report.md").unlink()
    before = snapshot(out)
    error = refused(capfd, [*SMALL, str(out), *brief])
    assert "--overwrite" in error and (what == "deleted" or "cannot be continued" in error)
    assert snapshot(out) == before


def test_overwrite_removes_the_old_run_first(brief, brief_run, tmp_path, monkeypatch, capfd):
    """Catches the old policy/ and report.md beside the new run's config.json."""
    out = tmp_path / "run"
    shutil.copytree(brief_run, out)
    (out / "prior").mkdir()
    monkeypatch.setattr(brain, "sample", interrupt)
    argv = [*SMALL, str(out), *brief, "--kl_coef", "0.7", "--overwrite"]
    assert "continue" in refused(capfd, argv, status=130)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "lock", "metrics.jsonl", "state.pt"}
    assert json.loads((out / "config.json").read_text())["kl_coef"] == 0.7
    assert not (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("lost", ["policy", "report.md", "samples.jsonl", "result.json"])
def test_what_a_finished_run_lost_is_made_again(lost, brief, brief_run, tmp_path):
    """Catches a finished run that is left without a result."""
    out = tmp_path / "run"
    shutil.copytree(brief_run, out)
    shutil.rmtree(out / lost) if lost == "policy" else (out / lost).unlink()
    assert brain.main([*SMALL, str(out), *brief]) == 0
    assert fingerprint(out) == fingerprint(brief_run)
    for name in ("samples.jsonl", "report.md"):
        old = (brief_run / name).read_text().replace(str(brief_run), str(out))
        assert (out / name).read_text() == old, name


def forked(argv: list, folder: Path, before=None, wait: bool = True):
    """brain.main in a child of this process, after before(): Finished, or the child's number."""
    texts = folder / "stdout.txt", folder / "stderr.txt"
    sys.stdout.flush()
    child = os.fork()
    if child:
        if not wait:
            return child
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Finished(status, *(path.read_text() for path in texts), Path(argv[-1]))
    try:
        status = 99
        for number, path in enumerate(texts, 1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        if before:
            before()
        status = brain.main(list(map(str, argv)))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait_for(path: Path) -> None:
    """Until a file is there."""
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_runs_at_once(brief, tmp_path, capfd):
    """Catches two processes that write into one folder, and a lock that outlives its process."""
    out, sign = tmp_path / "run", tmp_path / "running"

    def stay(*_):
        sign.touch()
        time.sleep(100)

    child = forked([*SMALL, out, *brief], tmp_path, lambda: setattr(brain, "take", stay), False)
    try:
        wait_for(sign)
        before = snapshot(out)
        for extra in ([], ["--overwrite"]):
            error = refused(capfd, [*SMALL, str(out), *brief, *extra])
            assert f"process {child} is running there" in error
        assert snapshot(out) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert brain.main([*SMALL, str(out), *brief, "--steps", "2"]) == 2  # it is another's, no lock
    assert "steps was 8, is 2" in capfd.readouterr().err


def test_no_input_lies_inside_the_folder(brief, brief_run, capfd):
    """Catches a policy trained from OUT/policy, which it then replaces."""
    before = snapshot(brief_run)
    for name in ("prior", "base", "reward", "data_dir"):
        argv = ["--task", "jsonl", "--out", str(brief_run), f"--{name}",
                os.path.relpath(brief_run / "policy"), "--overwrite"]
        if name in ("reward", "data_dir"):
            argv += ["--prior", "somebody/model"]
        argv += [] if name == "data_dir" else ["--data_dir", "elsewhere"]
        assert f"--{name} lies inside it" in refused(capfd, argv)
    assert snapshot(brief_run) == before


# -- One line where there were tracebacks ----------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "shortened", "prefixed", "edited", "emptied"])
def test_metrics_that_were_touched(how, brief, brief_run, half_run, tmp_path):
    """Catches metrics.jsonl found broken after all training, or continued as it is found."""
    out = tmp_path / "run"
    shutil.copytree(half_run, out)
    path = out / "metrics.jsonl"
    text = path.read_text()
    if how == "deleted":
        path.unlink()
    else:
        path.write_text({"shortened": text[:-9], "prefixed": "# mine\n" + text, "emptied": "",
                         "edited": text.replace("0", "1", 1)}[how])
    assert brain.main([*SMALL, str(out), *brief]) == 0
    assert fingerprint(out) == fingerprint(brief_run)


def test_references_longer_than_the_context(tmp_path):
    """Catches a test reference over GPT-2's positions, found in the evaluation, after training."""
    for name, reward in (("prior", False), ("reward", True)):
        save_checkpoint(tmp_path / name, "gpt2", reward=reward)
    rows = [{"prompt": " why", "reference": " no" * 700}, {"prompt": " so", "reference": ""}]
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows * 2)
    run = launch(tmp_path / "run", task="jsonl", prior=tmp_path / "prior", data_dir=tmp_path,
                 reward=tmp_path / "reward", steps=1, prompts_per_refresh=4, max_prompt_tokens=16)
    assert run.status == 0, run.stderr


def test_a_prompt_of_no_tokens(tmp_path, capfd):
    """Catches a prompt that the tokenizer leaves nothing of."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("?", "")
    write_lines(tmp_path / "train.jsonl", [{"prompt": "???"}, {"prompt": "why ?"}])
    cfg = config_of("--task", "jsonl", "--prior", "x", "--data_dir", tmp_path)
    assert [e.prompt for e in brain.load_task(cfg, "train", tokenizer)] == ["why ?"]
    assert "1 of 2 rows" in capfd.readouterr().out


def test_a_prior_of_another_size_between_parts(tmp_path, shelf, capfd, monkeypatch):
    """Catches a traceback where the checkpoint behind --prior is replaced by another model."""
    shutil.copytree(shelf["prior"], tmp_path / "prior")
    argv = [*shlex.split(JSONL), "--prior", str(tmp_path / "prior"), "--reward", shelf["reward"],
            "--data_dir", shelf["data"], "--steps", "3", "--prompts_per_step", "2",
            "--prompts_per_refresh", "2", "--save_every", "1", "--out", str(tmp_path / "run")]
    real = brain.Run.save

    def save(run, stage, step, **parts):
        real(run, stage, step, **parts)
        if step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(brain.Run, "save", save)
    refused(capfd, argv, status=130)
    monkeypatch.undo()
    save_checkpoint(tmp_path / "prior", hidden_size=64)
    error = refused(capfd, argv, status=1)
    path = Path(re.search(r"see (\S+)$", error)[1])
    assert "RuntimeError" in error and "Traceback" in path.read_text()


@pytest.mark.parametrize("what", ["closed stdout", "ASCII stdout", "ASCII locale"])
def test_nobody_listens(what, shelf, tmp_path, monkeypatch):
    """Catches a run that trains and then cannot print or write its report: no stdout, no UTF-8."""
    row = {**GOOD_ROWS["jsonl"], "prompt": "why ☀ – Größe 犬 ?"}
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [row] * 3)
    argv = [*shlex.split(JSONL), "--prior", shelf["prior"], "--reward", shelf["reward"], "--steps",
            "1", "--prompts_per_step", "2", "--prompts_per_refresh", "2", "--data_dir",
            str(tmp_path), "--out", str(tmp_path / "run")]
    if what == "ASCII locale":
        env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        done = subprocess.run(["sh", "-c", f"{shlex.join([sys.executable, brain.__file__, *argv])} "
                               ">&-"], env=env, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr[-500:]
    else:
        stream = io.TextIOWrapper(io.BytesIO(), "ascii") if what == "ASCII stdout" else None
        monkeypatch.setattr(sys, "stdout", stream)
        assert brain.main(argv) == 0
        monkeypatch.undo()
    assert "犬" in (tmp_path / "run/report.md").read_text(encoding="utf-8")
    json.loads((tmp_path / "run/result.json").read_text())


def limit_memory() -> None:
    """Let this process have 128 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**27
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("what", ["gz bomb", "samples"])
def test_out_of_memory_on_a_cpu(what, shelf, tmp_path):
    """Catches a traceback where memory runs out: a line without an end, too many samples."""
    argv = [*shlex.split(LIMITS), "--device", "cpu", "--prior", shelf["prior"], "--reward",
            shelf["reward"], "--out", str(tmp_path / "run")]
    if what == "gz bomb":
        path = tmp_path / "harmless-base/train.jsonl.gz"
        path.parent.mkdir()
        path.write_bytes(gzip.compress(b"[" * 2**20, 1) * 600)
        argv += ["--task", "hh", "--hh_subsets", "harmless-base", "--data_dir", str(tmp_path)]
    else:
        argv += ["--task", "jsonl", "--data_dir", shelf["data"], "--samples_per_prompt", "30000"]
    run = forked(argv, tmp_path, limit_memory)
    assert run.status in (1, 2) and run.stderr.count("\n") == 1, run.stderr[-800:]
    assert run.stderr.startswith("brain.py: "), run.stderr
    if what == "gz bomb":
        # zlib finds no room for itself, or Python none for what it has unpacked
        assert re.search(r"train\.jsonl\.gz.*(MemoryError|Error -4 )", run.stderr), run.stderr
    else:  # also inside the start check, which would say that the model is to blame
        assert "--micro_batch_tokens" in run.stderr, run.stderr


def test_out_of_memory_names_the_way_out(brief, tmp_path, capfd, monkeypatch):
    """Catches out of memory on a GPU told as a broken model, by the block that it happens in."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for name in ("check_model", "score_reward", "sample"):
        with monkeypatch.context() as patch:
            patch.setattr(brain, name, full)
            if name == "check_model":  # inside its block, too
                patch.undo()
                patch.setattr(brain, "sequence_log_prob", full)
            argv = [*SMALL, str(tmp_path / name), *brief]
            error = refused(capfd, argv, status=1 if name == "sample" else 2)  # 2: at the start
            assert "out of memory: repeat with a lower --micro_batch_tokens" in error


def test_the_hub_is_silent(capsys):
    """Catches the hub's retries told line by line where a model's name cannot be reached."""
    hub = huggingface_hub.utils.logging
    hub.set_verbosity_warning()
    assert brain.main(["--check"]) == 0 and hub.get_verbosity() == hub.ERROR


def test_other_errors_are_not_of_memory(brief, tmp_path, capfd):
    """Catches an error that is told as one of memory for a word in it, here in a file's name."""
    folder = tmp_path / "allocate"
    error = refused(capfd, [*SMALL, str(tmp_path / "run"), *brief[:2], "--reward", str(folder)])
    assert "allocate cannot be used" in error and "--micro_batch_tokens" not in error


def test_a_reward_file_that_ends_the_program(rack, shelf, tmp_path, capfd, monkeypatch):
    """Catches sys.exit() in somebody's FILE.py that ends a run as if it had been finished."""
    (tmp_path / "late.py").write_text(
        "import sys\ncalls = []\ndef reward(p, r, f):\n    calls.append(1)\n"
        "    return sys.exit() if len(calls) > 3 else [1.0] * len(r)\n")
    for source in (rack["r_leaves"], str(tmp_path / "late.py")):
        argv = [*shlex.split(RUN.format_map(rack)), "--reward", source, "--out",
                str(tmp_path / "run"), "--steps", "1", "--overwrite"]
        assert "SystemExit" in refused(capfd, argv)
    for code, status in ((0, 0), (None, 1), (3, 1), ("bye", 1)):  # wherever else it is raised
        monkeypatch.setattr(brain, "execute", lambda run, code=code: sys.exit(code))
        assert brain.main([*SMALL, str(tmp_path / "left")]) == status


def test_a_reward_file_runs(rack, tmp_path):
    """Catches texts with special tokens, references that are lost, and a reward that is not what
    the file returns."""
    source = tmp_path / "r.py"
    source.write_text("def reward(prompts, responses, references):\n"
                      "    assert len(prompts) == len(responses) == len(references)\n"
                      "    assert references[0] == ' so be it .', references\n"
                      "    assert not any('<|end' in text for text in responses)\n"
                      "    return [len(text) / 10 for text in responses]\n")
    run = launch(tmp_path / "run", task="jsonl", prior=rack["prior"], reward=source,
                 data_dir=rack["data"], steps=2, prompts_per_refresh=4)
    assert run.status == 0, run.stderr
    for line in (run.folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        for text, reward in zip(sample["responses"], sample["rewards"], strict=True):
            ended = text.endswith(EOS)
            length = len(text.replace(EOS, ""))
            assert reward == pytest.approx(length / 10 - (not ended), abs=1e-4)


@pytest.mark.parametrize("lost", ["policy"])
def test_a_place_that_cannot_be_written(lost, brief, tmp_path, capfd, monkeypatch):
    """Catches "no room" where a file stands in the way of OUT/policy."""
    out = tmp_path / "run"
    real = brain.Run.save

    def save(run, stage, step, **parts):
        real(run, stage, step, **parts)
        (out / lost).write_text("mine")

    monkeypatch.setattr(brain.Run, "save", save)
    error = refused(capfd, [*SMALL, str(out), *brief], status=1)
    assert f"run/{lost}" in error and "no room" not in error and (out / lost).read_text() == "mine"


def test_a_diverged_run_says_the_way_out(brief, tmp_path, capfd):
    """Catches a dead end: after a rate far too large the same command fails, a lower one is
    refused, and nothing says what to do."""
    out = tmp_path / "run"
    brain.main([*SMALL, str(out), *brief, "--lr", "1e8"])
    capfd.readouterr()
    error = refused(capfd, [*SMALL, str(out), *brief, "--lr", "1e-3"])
    assert "lr was 100000000.0, is 0.001" in error
    assert all(word in error for word in ("--overwrite", "--out", "--prior", "--reward"))


def test_reading_posts_costs_their_encoding(tmp_path):
    """Catches a reader that encodes each post more than once."""
    tokenizer = build_tokenizer()
    rows = [make_post(i, [f"my dog {i} was up and i say no . " * 4]) for i in range(2000)]
    write_lines(tmp_path / "datasets/tldr_3_filtered/train.jsonl", rows)
    cfg = config_of("--task", "tldr", "--prior", "p", "--reward", "r", "--data_dir", tmp_path)
    count = itertools.count()

    def counting(text, **options):
        next(count)
        return tokenizer(text, **options)

    brain.load_task(cfg, "train", counting)
    assert next(count) == 2000


# -- By the numbers: edits that nothing else notices -----------------------------------------------


def test_samples_of_a_uniform_model_are_the_uniforms_scaled():
    """Catches cumulative probabilities or uniforms in fp32, and a cdf that does not end at 1: over
    200,000 equally likely ids a sample must be ⌊u·V⌋."""
    V, n, R = 200_000, 32, 8
    model = build_model(vocab_size=V)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    want = torch.rand(n, R, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * V
    got, log_q = brain.sample(model, [[5, 6, 7]], n, R, eos_id=V,
                              generator=torch.Generator().manual_seed(7))
    assert got == [want.long().tolist()]
    torch.testing.assert_close(log_q, torch.full((1, n), -R * math.log(V)), rtol=1e-6, atol=0)


def test_every_sample_has_a_key_of_its_own(brief, tmp_path, monkeypatch):
    """Catches uniforms shared by prompts, by the steps of a refresh, by refreshes, by prior and
    policy in the evaluation, and a --seed that does not reach them."""
    real, used = brain.sample, {}

    def sample(*args, generator, **options):
        used[seed] += [g.initial_seed() for g in generator]
        return real(*args, generator=generator, **options)

    monkeypatch.setattr(brain, "sample", sample)
    for seed in (0, 1):
        used[seed] = []
        assert brain.main([*SMALL, str(tmp_path / f"{seed}"), *brief, "--seed", f"{seed}"]) == 0
    assert len(used[0]) == 8 * 4 + 2 * 8  # steps × prompts, and two models in the evaluation
    together = used[0] + used[1]
    assert len(set(together)) == len(together)


def test_epochs_are_permutations_and_differ():
    """Catches prompts that are skipped or seen twice in an epoch, epochs alike, and a seed or a
    stage that does not change them."""
    items = list(range(10))
    flat = brain.take(items, 0, 40, 7, "brain")
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == items and epoch != items for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    for key in ((8, "brain"), (7, "sft")):
        assert brain.take(items, 0, 10, *key) != epochs[0]
    for start, count in itertools.product((0, 4, 10, 25), (1, 6, 9, 15)):  # within, across epochs
        assert brain.take(items, start, count, 7, "brain") == flat[start : start + count]


class Step:
    """A Run that fit can train in: no folder but for metrics.jsonl, no states."""

    def __init__(self, out: Path, max_grad_norm: float):
        self.cfg, self.device = SimpleNamespace(max_grad_norm=max_grad_norm), "cpu"
        self.out, self.saved = out, []

    def start(self, stage):
        return 0

    def autocast(self):
        return contextlib.nullcontext()

    def require(self, fine, what, batch):
        assert fine.all(), what

    def save(self, stage, step, **parts):
        self.saved.append(step)

    def export(self, model, name):
        self.exported = name


def adamw_by_hand(w, gradients, lr, norm, eps=1e-5):
    """AdamW without decay, betas 0.9 and 0.999, gradients clipped, the rate falling to 0."""
    first, second, rates = torch.zeros_like(w), torch.zeros_like(w), []
    for step, gradient in enumerate(gradients):
        gradient = gradient * min(1.0, norm / gradient.norm().item())
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rates.append(lr * (len(gradients) - step) / len(gradients))
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        w = w - rates[-1] * unbiased[0] / (unbiased[1].sqrt() + eps)
    return w, rates


def test_optimizer_steps_by_hand(tmp_path):
    """Catches weight decay, other betas or eps, no clipping, a rate that is constant, ends one step
    early or late or is set after the step it is for, and a mean over micro-batches of unequal size
    that is not one over prompts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 4, generator=generator) * torch.tensor([3, 1e-5, 1, 0.1])
    model = torch.nn.Linear(4, 1, bias=False)
    start = model.weight.detach().clone() * 30
    model.weight.data.copy_(start)

    def loss_of(cfg, model, batch):  # its gradient is the prompts' mean, wherever the weights are
        return model(batch.prompt)[:, 0], {}

    drawn = (([SimpleNamespace(prompt=rows[:4]), SimpleNamespace(prompt=rows[4:])], {})
             for rows in x)
    run = Step(tmp_path, max_grad_norm=0.9)
    brain.fit(run, "sft", model, 5, 0.1, 2, drawn, loss_of)
    gradients = x.mean(1)[:, None]
    want, rates = adamw_by_hand(start, gradients, 0.1, 0.9)
    torch.testing.assert_close(model.weight.detach(), want, rtol=0, atol=2e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    norms = [gradient.norm().item() for gradient in gradients]
    assert [line["gradient_norm"] for line in lines] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < 0.9 < max(norms), "one is clipped, one is not"
    assert run.saved == [2, 4, 5] and run.exported == "prior"


def test_first_supervised_loss_by_plain_rows(shelf, tmp_path):
    """Catches a supervised loss that is summed, not per token, or at the run's temperature."""
    with recorded("sft_loss") as calls:
        run = launch(tmp_path / "run", task="jsonl", base=shelf["prior"], reward=shelf["reward"],
                     data_dir=shelf["data"], sft_batch=2, steps=1, temperature=0.5,
                     prompts_per_refresh=4)
    assert run.status == 0, run.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(shelf["prior"])
    (_, _, batch), _ = calls[0]
    losses = []
    for x, (y,) in zip(batch.prompts, batch.responses, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
        losses.append(-sum(log_p[i, token].item() for i, token in enumerate(y)) / len(y))
    assert y[-1] == 0 and len(y) > 2
    assert run.metrics("sft")[0]["loss"] == pytest.approx(statistics.mean(losses), abs=1e-5)


def test_stages_of_texts_see_each_row_once_an_epoch(shelf, tmp_path):
    """Catches steps of stage 1 or 2 that are all of the first rows, and rows that are left out."""
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [
            {"prompt": f" why{' so' * i} ?", "reference": " yes", "chosen": " no .",
             "rejected": f"{' no' * (i + 1)}"} for i in range(6)])
    with recorded("text_batches") as calls:
        run = launch(tmp_path / "run", task="jsonl", base=shelf["prior"], data_dir=tmp_path,
                     sft_batch=2, sft_epochs=2, reward_batch=3, reward_epochs=2, steps=1,
                     prompts_per_refresh=4)
    assert run.status == 0, run.stderr
    for columns, size in ((("reference",), 2), (("chosen", "rejected"), 3)):
        drawn = [row for (_, rows, names, _), _ in calls if names == columns for row in rows]
        epochs = drawn[:6], drawn[6:]
        assert all(len(set(epoch)) == 6 for epoch in epochs) and epochs[0] != epochs[1]
        assert len(run.metrics("sft" if size == 2 else "reward")) == 12 // size


def scored_batch(seed=0, b=3, n=4):
    """A batch whose scores are all unlike, and a policy's log-probabilities."""
    scores = torch.randn(6, b, n, generator=torch.Generator().manual_seed(seed))
    names = ("log_prior", "log_proposal", "reward", "raw_reward")
    known = dict(zip(names, scores, strict=False))
    known |= dict(eos_share=(scores[4] > 0).float(), response_tokens=scores[4].abs())
    batch = brain.pack([[1, 2]] * b, [[[3, 0]] * n] * b)
    batch.scores.update(known)
    return batch, scores[5]


@pytest.mark.parametrize("target", ["posterior", "argmax"])
def test_metrics_by_definition(target, monkeypatch):
    """Catches reward_spread without kl_coef or with the biased deviation, a KL of the wrong pair or
    direction, and an argmax of the raw reward."""
    batch, log_policy = scored_batch()
    monkeypatch.setattr(brain, "sequence_log_prob", lambda *_, **__: log_policy)
    cfg = dataclasses.replace(brain.Config(), kl_coef=0.7, target=target)
    loss, found = brain.policy_loss(cfg, None, batch)
    rows = [x.double().tolist() for x in (log_policy, *batch.scores.values())]
    for i, (q, p, q1, r, raw, eos, length) in enumerate(zip(*rows, strict=True)):
        worth = [math.exp(a + c / 0.7 - b) for a, b, c in zip(p, q1, r, strict=True)]
        if target == "argmax":
            worth = [float(c == max(r)) for c in r]
        alpha = [w / sum(worth) for w in worth]
        ratio = [math.exp(a - b) for a, b in zip(q, q1, strict=True)]
        beta = [w / sum(ratio) for w in ratio]
        moved = [a - b for a, b in zip(q1, p, strict=True)]
        want = {
            "reward": statistics.mean(r), "raw_reward": statistics.mean(raw),
            "eos_share": statistics.mean(eos), "response_tokens": statistics.mean(length),
            "ess_alpha": 1 / sum(w * w for w in alpha), "ess_beta": 1 / sum(w * w for w in beta),
            "reward_spread": statistics.stdev(r) / 0.7,
            "kl_to_prior": sum(w * (a - b) for w, a, b in zip(beta, q, p, strict=True)),
            "refresh_kl": statistics.mean(moved), "refresh_kl_sd": statistics.stdev(moved)}
        assert {name: values[i].item() for name, values in found.items()} == pytest.approx(
            want, abs=1e-5)
        want = sum(a * math.log(a / b) for a, b in zip(alpha, beta, strict=True) if a)
        assert loss[i].item() == pytest.approx(want, abs=1e-5)


def test_sampling_and_scoring_are_timed(unbroken):
    """Catches a refresh whose time is told nowhere, or with each of its steps."""
    lines = [line for line in lines_of(unbroken.folder) if line["stage"] == "brain"]
    assert len(lines) == 20
    for one, other in zip(lines[::2], lines[1::2], strict=True):
        assert one["seconds_sampling"] > 10 * other["seconds_sampling"] >= 0
        assert one["seconds_stepping"] > 0 and other["seconds_stepping"] > 0


@pytest.mark.parametrize("target", ["posterior", "argmax"])
def test_the_penalty_is_in_the_reward(target, unbroken):
    """Catches a missing end-of-text that costs nothing, or is taken off the raw reward, whatever
    the target; and the prompt's own, taken for the response's."""
    run = fake_run(unbroken.folder, missing_eos_penalty=3.0, target=target)
    batch = brain.pack([[2, 1], [2, 0]], [[[2, 0], [2, 3]], [[0], [4, 5]]])
    brain.judge(run, batch)
    off = batch.scores["raw_reward"] - batch.scores["reward"]
    torch.testing.assert_close(off, torch.tensor([[0.0, 3.0]] * 2))
    assert batch.scores["eos_share"].tolist() == [[1, 0]] * 2


def test_exact_kl_is_from_the_posterior(monkeypatch, unbroken):
    """Catches KL(policy ‖ posterior) in its place, in metrics.jsonl and on the last line."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.2, 0.6]])
    monkeypatch.setattr(brain, "score", lambda *_: q.log())
    batch = SimpleNamespace(scores={"log_posterior": p.log()})
    run = SimpleNamespace(require=lambda fine, *_: fine.all() or pytest.fail("no distribution"))
    want = sum(a * math.log(a / b) for a, b in zip(p[0].tolist(), q[0].tolist(), strict=True))
    assert brain.exact_kl(run, None, [batch, batch]) == pytest.approx(want)
    told = [line["kl_to_posterior"] for line in unbroken.metrics() if "kl_to_posterior" in line]
    result = unbroken.result()
    assert told[0] == pytest.approx(result["kl_to_posterior_start"], abs=2e-6)
    assert len(told) == 5 and told[0] > told[-1] > result["kl_to_posterior_end"] - 0.05


def test_the_guard_notices_a_drift_in_bf16():
    """Catches a bf16 guard that looks at the size of errors alone: small ones, all to one side."""
    def told(gap):
        batch = brain.pack([[1, 2]] * 16, [[[3, 4, 5, 0]] * 4] * 16)
        batch.scores.update(log_q=gap, log_proposal=torch.zeros(16, 4))
        found = []
        run = SimpleNamespace(dtype=torch.bfloat16,
                              require=lambda fine, *_: found.append(bool(fine.all())))
        brain.check_sampler(run, batch)
        return not found[0]

    sides = torch.ones(16, 4)
    sides[::2] = -1
    assert not told(0.2 * sides)  # rounding: 0.1 per √token
    assert told(0.2 * sides.abs())  # the same, to one side
    assert told(0.4 * sides)  # too large to be rounding


def test_refreshes_are_split_as_they_are_drawn(brief, tmp_path, monkeypatch):
    """Catches a refresh sorted before it is split into steps, which makes some steps of short
    prompts alone; an evaluation of the first prompts; the evaluation's prompts repeated."""
    real, steps, judged = brain.sample_batches, [], {}

    def sample_batches(run, models, name, examples, *rest):
        found = real(run, models, name, examples, *rest)
        if run.where == "eval":
            judged[name] = [example.prompt for example in examples]
        else:
            steps.extend(sorted(example.prompt for batch in batches for example in batch.examples)
                         for batches in found)
        return found

    def uneven(cfg, split):
        for i in range(48):
            yield brain.Example("sun " * (i % 12 + 1) + "a" * (i > 23), "sun", "sun", "moon")

    monkeypatch.setattr(brain, "toy_examples", uneven)
    monkeypatch.setattr(brain, "sample_batches", sample_batches)
    assert brain.main([*SMALL, str(tmp_path / "run"), *brief]) == 0
    prompts = [example.prompt for example in uneven(None, "train")]
    assert len(steps) == 8
    for step, found in enumerate(steps):
        want = brain.take(prompts, 8 * (step // 2), 8, 0, "brain")
        assert found == sorted(want[:4] if step % 2 == 0 else want[4:])
    assert judged["prior"] == judged["policy"]
    assert len(set(judged["prior"])) == 8 and judged["prior"] != prompts[:8]


def test_rows_of_the_evaluation_by_definition(unbroken, monkeypatch):
    """Catches a win rate of the wrong side, ties that do not count half, and a standard error of
    the KL over samples, where it is over prompts."""
    real, groups = brain.sample_batches, {}

    def sample_batches(run, models, name, *rest):
        groups[name], = found = real(run, models, name, *rest)
        return found

    monkeypatch.setattr(brain, "sample_batches", sample_batches)
    models = {name: transformers.AutoModelForCausalLM.from_pretrained(unbroken.folder / name)
              for name in ("prior", "policy")}
    run = fake_run(unbroken.folder, eval_samples=3)
    examples = brain.load_task(run.cfg, "test", run.tokenizer)[:9]
    rows, samples = brain.evaluate(run, models, examples)
    rewards = {name: [x["rewards"] for x in samples if x["model"] == name] for name in rows}
    wins = [statistics.mean((x > y) + 0.5 * (x == y) for x in xs for y in ys)
            for xs, ys in zip(rewards["policy"], rewards["prior"], strict=True)]
    assert any(x == y for xs, ys in zip(*rewards.values(), strict=True) for x in xs for y in ys)
    assert rows["policy"]["win_rate_vs_prior"] == pytest.approx(statistics.mean(wins), abs=1e-6)
    assert rows["policy"]["win_rate_vs_prior_ci"] == pytest.approx(
        brain.win_rate(torch.tensor(wins))[1], abs=1e-6)
    for name, batches in groups.items():
        means = []
        for batch in batches:
            ratio = batch.scores["log_proposal"] - batch.scores["log_prior"]
            means += [statistics.mean(row) for row in ratio.tolist()]
        assert rows[name]["kl_to_prior"] == pytest.approx(statistics.mean(means), abs=1e-6)
        want = statistics.stdev(means) / math.sqrt(9)
        assert rows[name]["kl_to_prior_se"] == pytest.approx(want, abs=1e-6)


def test_a_step_counts_all_its_micro_batches(tmp_path):
    """Catches a logged loss of the last micro-batch alone, and one of unequal ones' means."""
    halves = [SimpleNamespace(prompt=torch.zeros(k), part=k) for k in (1, 3)]

    def loss_of(cfg, model, batch):
        values = torch.arange(batch.part, dtype=torch.float32) + batch.part
        return values.requires_grad_(), {"reward": values}

    found = brain.run_losses(Step(tmp_path, 1.0), None, halves, loss_of)
    assert found == {"loss": 3.25, "reward": 3.25}


def test_the_reward_model_begins_from_the_prior(shelf, tmp_path):
    """Catches stage 2 trained at stage 1's rate or from a backbone that knows nothing, and an
    accuracy of the wrong side."""
    for k, split in enumerate(("train", "test")):
        write_lines(tmp_path / f"{split}.jsonl", [
            {"prompt": f" why {'so ' * (i + k)}?", "reference": f" {'yes no'.split()[k]} {i} .",
             "chosen": f" {WORDS[7 * i + k]}", "rejected": f" {WORDS[5 * i + k + 1]} no"}
            for i in range(5)])
    with recorded("preference_loss") as calls, recorded("sample_batches") as sampled:
        run = launch(tmp_path / "run", task="jsonl", base=shelf["prior"], data_dir=tmp_path,
                     sft_batch=5, reward_batch=5, sft_lr=1e-2, reward_lr=1e-4, steps=1,
                     prompts_per_refresh=4)
    assert run.status == 0, run.stderr
    (_, _, batch), (loss, _) = calls[0]
    prior, reward = (kind.from_pretrained(run.folder / name) for kind, name in (
        (transformers.AutoModelForCausalLM, "prior"),
        (transformers.AutoModelForSequenceClassification, "reward")))
    moved = [(reward.base_model.state_dict()[name] - value).abs().max().item()
             for name, value in prior.base_model.state_dict().items()]
    assert 0 < max(moved) < 1.5e-4  # one step of AdamW from the prior, at reward_lr
    for name, value in sampled[0][0][1]["prior"].state_dict().items():  # which it leaves alone
        assert torch.equal(value, prior.state_dict()[name]), name

    first = run.metrics("reward")[0]
    assert first["accuracy"] == pytest.approx((loss < math.log(2)).float().mean().item())
    assert first["loss"] == pytest.approx(loss.mean().item(), abs=1e-6)


# -- Kill -9 before and after every file operation: `python test_brain.py kills` -------------------

THREE_STAGES = (
    "--task toy --device cpu --steps 4 --save_every 2 --max_response_tokens 2 --sft_epochs 1 "
    "--max_comparison_tokens 2 --sft_batch 12 --reward_epochs 1 --reward_batch 12 --eval_prompts 3 "
    "--samples_per_prompt 2 --prompts_per_step 2 --prompts_per_refresh 2 --eval_samples 2 --out"
).split()


def few_examples(cfg, split, real=brain.toy_examples):
    """The toy's first examples: a stage is four steps."""
    return itertools.islice(real(cfg, split), 48 if split == "train" else 8)


class Dying:
    """Replaces what changes files below a folder by versions that note their calls, and that kill
    this process with SIGKILL before or after one of them; write_text also between open and write.
    """

    def __init__(self, folder: Path, kill: int = 0, after: bool = False):
        self.folder, self.kill, self.after = str(folder), kill, after
        self.calls, self.inside = [], False

    def __call__(self) -> None:
        """Begin, in a process of its own."""
        brain.toy_examples = few_examples
        self.wrap(builtins, "open", self.written)
        io.open = builtins.open
        for owner, name in (
                (os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace"),
                (shutil, "rmtree"), (Path, "unlink"), (Path, "write_text"), (Path, "mkdir")):
            self.wrap(owner, name, lambda path, *_, **__: path)
        self.wrap(os, "fsync", lambda *_: self.folder + "/fsync")

    @staticmethod
    def written(path, mode="r", *_, **__):
        """The path, if it is opened to be written."""
        return path if isinstance(path, (str, Path)) and set(mode) & set("wax+") else ""

    def wrap(self, owner, name: str, path_of) -> None:
        real = getattr(owner, name)

        def dying(*args, **options):
            path = str(path_of(*args, **options))
            if self.inside or not path.startswith(self.folder):
                return real(*args, **options)
            self.calls.append(f"{name} {Path(path).name}")
            mine = len(self.calls) == self.kill
            if mine and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.inside = name != "write_text"  # whose own open counts
            try:
                result = real(*args, **options)
            finally:
                self.inside = False
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dying)


def outcome(out: Path) -> tuple:
    """All that two runs of one command must have in common."""
    result = json.loads((out / "result.json").read_text())
    result.pop("seconds")
    texts = [(out / name).read_text() for name in ("samples.jsonl", "report.md", "config.json")]
    assert not list(out.glob("*.part"))
    return fingerprint(out), result, texts


def unkilled(out: Path) -> tuple:
    """The outcome of the run that nothing happens to, and its file operations."""
    dying, names = Dying(out), out.parent / "calls.json"

    def before():
        dying()
        brain.execute = noted

    def noted(run, real=brain.execute):
        result = real(run)
        names.write_text(json.dumps(dying.calls))
        return result

    run = forked([*THREE_STAGES, out], out.parent, before)
    assert run.status == 0 and not run.stderr, run.stderr
    found = outcome(out)
    shutil.rmtree(out)
    return found, json.loads(names.read_text())


def killed(out: Path, kill: int, after: bool) -> tuple:
    """The outcome of a run that is killed at a file operation and then repeated."""
    assert forked([*THREE_STAGES, out], out.parent, Dying(out, kill, after)).status == -9
    run = forked([*THREE_STAGES, out], out.parent,
                 lambda: setattr(brain, "toy_examples", few_examples))
    assert run.status == 0 and not run.stderr, run.stderr
    found = outcome(out)
    shutil.rmtree(out)
    return found


def test_killed_at_a_file_operation(tmp_path):
    """Catches a kill that a run does not survive, or that changes a number: where a stage's first
    state, its weights and the result take their places. The program `kills` tries all the places.
    """
    out = tmp_path / "run"
    whole, calls = unkilled(out)
    states = [i for i, call in enumerate(calls, 1) if call == "rename state.pt.part"]
    places = [(states[0], False), (states[-1], True), (len(calls), False),
              (calls.index("rename policy.part") + 1, False)]
    for kill, after in places:
        assert killed(out, kill, after) == whole, (calls[kill - 1], after)


def print_kills(argv: list[str]) -> None:
    """kills [EVERY]: kill -9 before and after each, or every so many-th, file operation."""
    torch.set_num_threads(1)
    every = int(argv[0]) if argv else 1
    out, equal, all_of_them = Path(tempfile.mkdtemp()) / "run", 0, 0
    whole, calls = unkilled(out)
    for kill, after in itertools.product(range(1, len(calls) + 1, every), (False, True)):
        all_of_them += 1
        try:
            assert killed(out, kill, after) == whole, "the outcome differs"
            equal += 1
        except (AssertionError, OSError) as error:
            print("after" if after else "before", kill, calls[kill - 1], str(error)[-300:])
            shutil.rmtree(out, ignore_errors=True)
    print(f"{equal} of {all_of_them} killed runs end as the unbroken one, {len(calls)} operations")


# ------------------------------------------------------------------------------------------------
# No card, yet what a card would show: tensors that say "pretend" and keep their numbers on the
# CPU. As on CUDA, an operation on both devices raises, and what makes the host wait is counted.
# All in a process of its own, `python test_brain.py pretend …`, as no device can be taken back
# ------------------------------------------------------------------------------------------------

WAITS = collections.Counter()  # how often the host has waited for the device, by the cause
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")
A_DEVICE = re.compile(
    r", device=(?!self)[\w.]+(?=\))|\.to\([\w.]*device\)|, (?!cfg)[\w.]+\.device(?=\))")


class Pretend(Tensor):
    """A tensor on the device "pretend", which holds a real one."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device="pretend:0",
            storage_offset=held.storage_offset())

    def __init__(self, held):
        self.held = held

    def tolist(self):
        WAITS["tolist"] += 1
        return self.held.tolist()

    def __format__(self, form):
        return format(self.item(), form)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), options=None):
        return on_the_device(function, args, options or {})


class Pretending(TorchDispatchMode):
    """Sees what makes tensors, too."""

    def __torch_dispatch__(self, function, types, args=(), options=None):
        return on_the_device(function, args, options or {})


def on_the_device(function, args, options):
    """An operation as CUDA would do it: RuntimeError where its tensors are on two devices."""
    leaves, tree = tree_flatten((args, options))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, Pretend)]
    asked = torch.device(options.get("device") or "cpu").type
    if not here and asked == "cpu":
        return function(*args, **options)
    name = function.overloadpacket.__name__
    moves = name in ("_to_copy", "copy_")
    indexes = name == "index" and isinstance(args[0], Pretend)  # whose indices may be on the CPU
    strays = any(x.dim() for x in tensors if not isinstance(x, Pretend))
    if here and strays and not moves and not indexes:
        places = [(x.device.type, *x.shape) for x in tensors]
        raise RuntimeError(f"{function} on two devices: {places}")
    masked = name in ("index", "index_put_") and any(x.dtype is torch.bool for x in here[1:])
    down = bool(here) and moves and options.get("device") is not None and asked == "cpu"
    if down or masked or name in READS or (
            (moves or indexes) and len(here) < len(tensors)):
        WAITS[name] += 1  # copies in both directions: they wait, unless memory is pinned
    plain = [x.held if isinstance(x, Pretend) else torch.device("cpu")
             if isinstance(x, torch.device) else x for x in leaves]
    plain_args, plain_options = tree_unflatten(plain, tree)
    out = function(*plain_args, **plain_options)
    if down:
        return out
    out = tree_map(lambda x: Pretend(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(function, args, options, out) if here else out


@contextlib.contextmanager
def pretend_device():
    """While it lasts, "pretend" names a device."""
    backend = type("Backend", (_DummyBackendModule,), {
        "get_amp_supported_dtype": lambda self: [torch.bfloat16]})()
    _setup_privateuseone_for_python_backend("pretend", backend)

    def empty(size, stride, *, dtype=None, **_):
        return Pretend(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        WAITS["copy"] += not isinstance(source, Pretend)
        target.held.copy_(getattr(source, "held", source))
        return target

    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")  # torch.tensor asks for these
    kernels.impl("empty_strided", empty)
    kernels.impl("_copy_from", copy_from)
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # autocast casts nothing
    rest.fallback(torch.library.fallthrough_kernel)
    with Pretending():
        yield kernels, rest


def rehearse(family: str, folder: Path, out: str, source: str | None = None) -> Finished:
    """A run on the pretend device, of this brain.py or of another text of it: three kinds of
    reward, one for each family, a step of each stage, all of Y listed."""
    global brain
    kept, flags = brain, dict(base=folder / "gpt_neox")
    if family != "gpt_neox":
        reward = folder / ("judge.py" if family == "gpt2" else "scorer")
        flags = dict(prior=folder / family, reward=reward)
    try:
        if source:
            (folder / "planted.py").write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location("planted", folder / "planted.py")
            sys.modules["planted"] = brain = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(brain)
        with pytest.MonkeyPatch.context() as patch:
            init = brain.Run.__init__

            def start(run, cfg):
                init(run, cfg)
                run.device = "pretend"
                run.autocast = functools.partial(torch.autocast, "pretend", torch.bfloat16)

            patch.setattr(brain.Run, "__init__", start)
            for name in ("save", "export"):  # these tensors have no memory to be written
                patch.setattr(brain.Run, name, lambda *_, **__: None)
            return launch(folder / f"run-{out}", task="jsonl", data_dir=folder, steps=1,
                          sft_epochs=1, reward_epochs=1, prompts_per_step=3, prompts_per_refresh=3,
                          max_prompt_tokens=16, max_response_tokens=2, max_comparison_tokens=4,
                          eval_prompts=3, overwrite="yes", micro_batch_tokens=2000, **flags)
    finally:
        brain = kept


def count_waits() -> list[dict]:
    """How often the host waits for the device in each part, for batches of several shapes."""
    policy, reward = (build_model("gpt_neox", reward=r).to("pretend") for r in (False, True))
    run, rows = SimpleNamespace(
        cfg=brain.Config(), autocast=contextlib.nullcontext, device="pretend"), []
    run.require = lambda *told: brain.Run.require(run, *told)

    def waits(part, *args, **options):
        WAITS.clear()
        return part(*args, **options), WAITS.total()

    for B, n, P, R in ((1, 2, 3, 2), (3, 2, 3, 2), (1, 8, 3, 2), (1, 2, 17, 9), (2, 4, 9, 5)):
        prompts, row = [draw_ids(P, b) for b in range(B)], dict(B=B, n=n, P=P, R=R)
        (ids, log_q), row["sampling"] = waits(brain.sample, policy, prompts, n, R, eos_id=-1,
                                              generator=[brain.make_generator(0)] * B)
        batch, row["packing"] = waits(brain.pack, prompts, ids, "pretend")
        _, row["scoring"] = waits(brain.sequence_log_prob, policy, batch)
        raw, row["judging"] = waits(brain.score_reward, reward, batch)
        batch.scores.update(dict(reward=raw.detach(), raw_reward=raw.detach(), log_prior=log_q,
                                 log_proposal=log_q, eos_share=log_q, response_tokens=log_q))
        one, two, three = (waits(brain.run_losses, run, policy, [batch] * k, brain.policy_loss)[1]
                           for k in (1, 2, 3))
        rows.append(row | dict(training=two - one, again=three - two, metrics=2 * one - two))
    return rows


def new_toy():
    """brain's toy model and tokenizer, on a CPU."""
    return brain.toy_model(SimpleNamespace(device="cpu"))


def pretend(argv: list[str]) -> None:
    """Every run and count of the pretend device, as one JSON object."""
    folder, = map(Path, argv)
    transformers.logging.disable_progress_bar()
    _, tokenizer = new_toy()
    for family in FAMILIES:
        config = build_config(family)
        config.vocab_size, config.num_hidden_layers = len(tokenizer), 1  # so that Y can be listed
        for part in (transformers.AutoModelForCausalLM.from_config(config), tokenizer):
            part.save_pretrained(folder / family)
    config.num_labels = 1
    for part in (transformers.AutoModelForSequenceClassification.from_config(config), tokenizer):
        part.save_pretrained(folder / "scorer")
    (folder / "judge.py").write_text("def reward(x, y, z): return [len(text) for text in y]")
    row = dict(prompt="sun the moon", reference="moon", chosen="sun", rejected="the a")
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", [row | dict(prompt=w + " a") for w in KEY_WORDS])
    found, source = {}, Path(brain.__file__).read_text(encoding="utf-8")
    with pretend_device():
        found["runs"] = {family: rehearse(family, folder, family)[:3] for family in FAMILIES}
        found["waits"], found["slips"] = count_waits(), {}
        for slip in A_DEVICE.finditer(source):  # each mention of a device, dropped
            begin, end = slip.span()
            line = source[source.rindex("\n", 0, begin) + 1 : source.index("\n", end)].strip()
            planted = source[:begin] + source[end:]
            runs = (rehearse(family, folder, "slip", planted)  # the longest last
                    for family in ("gpt2", "llama", "gpt_neox"))
            errors = (re.search(r"aten\S+ on two devices.*", run.stderr) for run in runs)
            found["slips"][f"{line} less {slip[0]}"] = next((e[0] for e in errors if e), None)
    print(json.dumps(found))


KEY_WORDS = "sun moon star rain".split()  # tokens of brain's toy, for the pretend runs


def compare_in_small(folder: Path, name: str) -> None:
    """The comparison of SHORT_PLAN or SHORT_DIALOGUES; NAME.txt is what it said, once done."""
    (folder / name).mkdir()
    with open(folder / f"{name}.part", "w") as file, contextlib.redirect_stdout(file):
        if name == "compared":
            compare(Plan(out=f"{folder}/{name}", **SHORT_PLAN))
        else:
            for split, rows in FEW_DIALOGUES.items():
                write_gz(folder / f"hh/harmless-base/{split}.jsonl.gz", rows)
            compare_dialogues(Dialogues(out=f"{folder}/{name}", data_dir=f"{folder}/hh",
                                        **SHORT_DIALOGUES))
    (folder / f"{name}.part").rename(folder / f"{name}.txt")


def said_beside(beside, name: str) -> str:
    """What a comparison said in the process beside this one, which may still be at it."""
    process, folder = beside
    while not (folder / f"{name}.txt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return (folder / f"{name}.txt").read_text()


def work_beside(argv: list[str]) -> None:
    """The comparisons in small and the pretend device, those that are named."""
    folder, *wanted = argv
    for name in [name for name in wanted if name != "pretended"]:
        # in a child: no gradient may be computed before the pretend device is there
        child = multiprocessing.Process(target=compare_in_small, args=[Path(folder), name])
        child.start()
        child.join()
    if "pretended" in wanted:
        pretend([folder])


@pytest.fixture(scope="module", autouse=True)
def beside(request, tmp_path_factory):
    """A process begun before the first test, and its folder: most tests leave one of two cores
    idle, so it does what takes long and is looked at late."""
    used = set(itertools.chain(*(item.fixturenames for item in request.session.items)))
    wanted = sorted({"compared", "conversed", "pretended"} & used)
    if not wanted:
        yield None
        return
    folder = tmp_path_factory.mktemp("beside")
    with subprocess.Popen(
            [sys.executable, __file__, "beside", folder, *wanted], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}) as process:
        yield process, folder
        process.kill()


@pytest.fixture(scope="module")
def pretended(beside):
    """What that process has found of the pretend device."""
    stdout, stderr = beside[0].communicate()
    assert beside[0].returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_is_left_on_the_cpu(family, pretended):
    """Catches a tensor that is made or kept on the CPU, in sampling, scoring, rewards of all
    three kinds, losses, steps of every stage, the exact KL and evaluation."""
    status, stdout, stderr = pretended["runs"][family]
    assert status == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["kl_to_posterior_end"] > 0 and result["kl_to_posterior_start"] > 0


def test_a_forgotten_device_is_noticed(pretended):
    """Catches a pretend device that notices nothing: each `device=` and `.to(device)` of brain.py
    is dropped in turn, and one of the three runs stops at an operation on two devices."""
    assert len(pretended["slips"]) >= 12
    assert not [slip for slip, error in pretended["slips"].items() if not error]


def test_how_often_the_host_waits(pretended):
    """Catches an .item(), a mask as an index or a copy in a loop, which would leave the card
    idle: one wait per sampled token at most, and a fixed number per micro-batch."""
    rows = pretended["waits"]
    for row in rows:
        assert row["sampling"] - row["R"] == rows[0]["sampling"] - rows[0]["R"] <= 12, row
        assert row["training"] == row["again"], row
        for part in ("packing", "scoring", "judging", "training"):
            assert row[part] == rows[0][part] <= 8, (part, row)
        assert row["metrics"] == rows[0]["metrics"] <= 20, row


# ---- bf16, masks and settings that only a card would punish --------------------------------------


def under_bf16(patch) -> None:
    """Every brain.Run computes as on CUDA: bf16 autocast, the matrices of frozen models in bf16."""
    start = brain.Run.__init__

    def as_on_cuda(run, cfg):
        start(run, cfg)
        run.dtype = torch.bfloat16
        run.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    patch.setattr(brain.Run, "__init__", as_on_cuda)


def deep_model(family: str, tied: bool, hidden: int = 32, layers: int = 16, head: float = 0.1):
    """A model of many layers with the weights of brain.load's; `head` decides how sharp it is."""
    config = build_config(family)
    config.tie_word_embeddings = tied
    config.hidden_size, config.num_hidden_layers = hidden, layers
    if hasattr(config, "head_dim"):
        config.head_dim = hidden // 4
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            last = weight is model.get_output_embeddings().weight
            weight.normal_(0, head * (32 / hidden) ** 0.5 if last else 0.8 / weight.shape[0] ** 0.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.05)
    return fp32_head(model)


def fp32_head(model):
    """The model with brain.load's head; one of bf16 weights is cast for each product."""
    head = model.get_output_embeddings()

    def forward(hidden):
        return torch.nn.functional.linear(hidden, head.weight.float(), None)

    head.forward = functools.partial(brain.exact_head, forward)
    return model


@torch.no_grad()
def prior_noise(model, batch) -> dict[str, float]:
    """refresh_kl_sd of a policy that equals the prior, in nats: the prior frozen as brain.py does,
    and wholly in bf16; all under bf16 autocast."""
    found = {}
    for how in ("frozen", "bf16"):
        prior = copy.deepcopy(model)
        if how == "frozen":
            brain.freeze(prior, torch.bfloat16)
        else:
            prior.bfloat16()
            fp32_head(prior)
        policy = fp32_head(copy.deepcopy(prior).float())
        with torch.autocast("cpu", torch.bfloat16):
            log_p, log_q = (brain.sequence_log_prob(m, batch) for m in (prior, policy))
        found[how] = (log_q - log_p).std().item()
    return found | {"nats_a_token": (log_q.sum() / batch.length.sum()).item()}


def noise_batch(R: int, prompts: int = 3):
    """Prompts of 40 ids and less, four responses to each."""
    return brain.pack([draw_ids(40 - 7 * b, b) for b in range(prompts)],
                      [[draw_ids(R - i, 100 * b + i) for i in range(4)] for b in range(prompts)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_have_equal_scores_in_bf16(family, tied):
    """Catches a prior whose rounding differs from the policy's, which would put 0.05 to 0.5 nats
    of noise into alpha: all of it in bf16, or its embeddings, norms or head."""
    noise = prior_noise(deep_model(family, tied), noise_batch(12, 2))
    assert noise["frozen"] == 0 and noise["bf16"] > 1e-3, noise


def test_the_exact_kl_is_computed_as_in_training(tmp_path, monkeypatch):
    """Catches an exact KL outside the run's autocast, a head in bf16 inside it, a start check
    under TF32 or a stage 3 without, and cuDNN's attention left on; over a whole run in bf16."""
    seen = collections.defaultdict(set)

    def watch(name, state):
        real = getattr(brain, name)

        def watched(*args, **options):
            seen[name].add(state(*args))
            return real(*args, **options)

        monkeypatch.setattr(brain, name, watched)

    def heads(forward, hidden):
        logits = head(forward, hidden)
        seen["heads"].add((torch.is_autocast_enabled("cpu"), logits.dtype))
        return logits

    under_bf16(monkeypatch)
    tf32, head = torch.backends.cuda.matmul, brain.exact_head
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(brain, "exact_head", heads)
    watch("check_model", lambda *_: (tf32.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()))
    watch("policy_loss", lambda *_: tf32.allow_tf32)
    score, exact = brain.sequence_log_prob, brain.exact_kl

    def exactly(run, model, batches):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(brain, "sequence_log_prob", scored)
            return exact(run, model, batches)

    def scored(model, *rest, **options):
        seen["exact_kl"].add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return score(model, *rest, **options)

    monkeypatch.setattr(brain, "exact_kl", exactly)
    folder, (_, tokenizer) = tmp_path / "prior", new_toy()
    config = build_config()
    config.vocab_size = len(tokenizer)
    for part in (transformers.AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(folder)
    (tmp_path / "judge.py").write_text("def reward(x, y, z): return [len(text) for text in y]")
    row = dict(prompt="sun the moon", reference="moon")
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [row] * 3)
    run = launch(tmp_path / "run", task="jsonl", data_dir=tmp_path, prior=folder, steps=2,
                 reward=tmp_path / "judge.py", max_response_tokens=2, max_prompt_tokens=16,
                 max_comparison_tokens=4)
    try:
        assert run.result()["kl_to_posterior_end"] > 0
    finally:
        tf32.allow_tf32 = False
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert seen["exact_kl"] == {(True, torch.bfloat16)}
    assert {dtype for _, dtype in seen["heads"]} == {torch.float32}
    assert seen["check_model"] == {(False, False)} and seen["policy_loss"] == {True}


@pytest.mark.parametrize("cuda", [True, False])
def test_gradients_on_a_card_are_summed_in_one_order(cuda, monkeypatch, tmp_path):
    """Catches a gradient whose sums differ from run to run, so that a killed run does not end as
    another (at 410M parameters from step 0 on, seen on an H200); a mode that is left on, under
    which sampling's cumulative sum would raise; and one that slows a CPU down."""
    modes, weight = [], torch.ones(3, requires_grad=True)

    def loss_of(cfg, model, batch):
        modes.append(torch.are_deterministic_algorithms_enabled())
        weight.register_hook(lambda _: modes.append(torch.are_deterministic_algorithms_enabled()))
        return 2 * weight, {}

    run = SimpleNamespace(cfg=None, autocast=contextlib.nullcontext, require=lambda *_: None,
                          device="cuda" if cuda else "cpu")
    batch = SimpleNamespace(prompt=torch.ones(3, 1))
    found = brain.run_losses(run, None, [batch] * 2, loss_of)
    assert found == {"loss": 2.0} and not torch.are_deterministic_algorithms_enabled()
    assert set(modes) == {cuda} and len(modes) == 5
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    brain.Run(brain.parse_config(["--out", str(tmp_path / "run"), "--device", "cpu"]))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # or cuBLAS refuses that mode


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_sees_itself(family):
    """Catches an empty row of attention, for which kernels return NaN or what they like, and
    scores that change with what padding sees: as before, nothing, or with rows unpadded."""
    model, (prompts, responses) = build_model(family), make_ids(4)
    batch, masks, blind = brain.pack(prompts, responses), [], False
    real = batch.prompt >= 0

    def look(module, args, options):
        mask = options["attention_mask"]
        if blind and mask.shape[-2] == mask.shape[-1] == real.shape[1]:
            mask = mask.masked_fill(~real[:, None, :, None], mask.min())
        masks.append(mask)
        return args, options | {"attention_mask": mask}

    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    score = brain.sequence_log_prob(model, batch)
    assert not real[:, 0].any() and len(masks) == 2  # padded on the left; prompt, branches
    brain.sample(model, prompts, 4, 3, eos_id=-1)
    for mask in masks:
        assert mask.shape[1] == 1 and (mask == 0).any(-1).all()
    blind = True
    torch.testing.assert_close(brain.sequence_log_prob(model, batch), score, rtol=1e-6, atol=0)
    assert (masks[-2] != 0).all(-1).any()  # as it was, with empty rows
    alone = table_of(plain_score, build_model(family), prompts, responses).float()
    torch.testing.assert_close(score, alone, rtol=1e-6, atol=1e-4)


def test_sampling_goes_in_batches_of_its_own(checkpoints, tmp_path):
    """Catches a sampler that is fed training's micro-batches, or more prompts than its rule says
    (eight times as many), and samples that depend on either."""
    row = dict(reference=" yes")
    for split, rows in (("train", 40), ("test", 3)):
        write_lines(tmp_path / f"{split}.jsonl",
                    [row | dict(prompt=" a" * (1 + 7 * i % 23)) for i in range(rows)])
    found = {}
    for tokens in (16384, 250):
        with recorded("sample") as samples, recorded("policy_loss") as losses:
            launch(tmp_path / str(tokens), task="jsonl", data_dir=tmp_path, steps=1, lr=1e-9,
                   prior=checkpoints / "gpt_neox/prior", reward=checkpoints / "gpt_neox/reward",
                   prompts_per_step=40, prompts_per_refresh=40, max_prompt_tokens=32,
                   micro_batch_tokens=tokens).result()
        calls = [(len(args[1]), ids) for args, (ids, _) in samples if args[2] == 4]  # not eval's 2
        ids = [ys for _, part in calls for ys in part]
        P, n, R, V = max(len(x) for a, _ in samples for x in a[1]), 4, 12, len(build_tokenizer())
        size = 8 * max(1, int(tokens / (P + n * R * (1 + V / 2**16))))
        assert [B for B, _ in calls] == [min(size, 40 - i) for i in range(0, 40, size)]
        most = max(len(args[2].prompt) for args, _ in losses)
        assert most == 40 if tokens == 16384 else 1 < 4 * most <= calls[0][0] < 40
        found[tokens] = ids
    same = [a == b for pair in zip(*found.values(), strict=True)
            for a, b in zip(*pair, strict=True)]
    assert len(same) == 160 and sum(same) >= 156  # rounding moves one draw in some thousands


# ------------------------------------------------------------------------------------------------
# What only a card can tell: `python test_brain.py gpu` fills the README's cells in one go, about
# 90 seconds on an H200 at Pythia 1B's shape; without a card it runs in small, to be tested
# ------------------------------------------------------------------------------------------------

ON_A_GPU = """--hidden 2048 --layers 16 --heads 8 --vocabulary 50304 --prompt_tokens 400
--samples 8 --repeats 2""".split()
IN_SMALL = """--hidden 32 --layers 2 --heads 2 --vocabulary 64 --prompt_tokens 20 --threads 1
--response_tokens 5 --samples 4 --repeats 1 --device cpu""".split()


LOW = torch.finfo(torch.bfloat16).min  # as brain.py masks


def table(*cells) -> None:
    """A row of a Markdown table, or its title; floats with three digits."""
    print("|", " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells), "|",
          flush=True)


def titles(*names) -> None:
    """The head of a table."""
    print()
    table(*names)
    print("|" + "---|" * len(names), flush=True)


def attention(bench: Bench) -> None:
    """NaN, rounding and time of each backend, on shapes and masks of brain.py; "low": a head whose
    scores are all near −120, as in pytorch's issue 196678."""
    cuda, n = bench.args.device == "cuda", bench.args.samples[0]
    P, R = bench.args.prompt_tokens, bench.args.response_tokens
    backends = dict(default=None, cuDNN=SDPBackend.CUDNN_ATTENTION, math=SDPBackend.MATH,
                    efficient=SDPBackend.EFFICIENT_ATTENTION)
    titles("attention by", "head", "queries × keys", "low", "NaN in y, dq, dk, dv",
           "off fp32 by, as a share", "first ms", "later ms")
    for D, (Q, K), low, name in itertools.product(
            (64, 256) if cuda else (16,), ((P, P), (n, P + n), (4 * R, P + 4 * R)), (0, -120),
            backends):
        torch.manual_seed(0)
        tensors = [torch.randn(4, 8, rows, D, device=bench.args.device) for rows in (Q, K, K)]
        if low:
            tensors[0][..., 0], tensors[1][..., 0] = 1, low * math.sqrt(D)
        place = torch.arange(K, device=bench.args.device)
        own = place[-Q:, None]  # a query's own key; the fourth prompt is half padding
        real = place >= torch.tensor([[0], [1], [3], [P // 2]], device=bench.args.device)
        see = (real[:, None] & (place <= own)) | (place == own)
        mask = torch.zeros(see.shape, device=see.device).masked_fill(~see, LOW)[:, None]

        def call(dtype, backend):
            x = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]  # noqa: B023
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                y = torch.nn.functional.scaled_dot_product_attention(
                    *x, attn_mask=mask.to(dtype))  # noqa: B023
                y.backward(torch.ones_like(y))
            return [y.detach().float(), *(t.grad.float() for t in x)]

        try:
            times = []
            for _ in range(4):
                start = bench.wait()
                found = call(torch.bfloat16, backends[name])
                times.append(1e3 * (bench.wait() - start))
        except RuntimeError as error:
            table(name, D, f"{Q} × {K}", low, str(error).partition("\n")[0][:40], "", "", "")
            continue
        nan = [int((~x.isfinite()).sum()) for x in found]
        off = ((found[0] - (true := call(torch.float32, SDPBackend.MATH))[0]).norm()
               / true[0].norm()).item()
        table(name, D, f"{Q} × {K}", low, *([nan, off, times[0], statistics.mean(times[1:])]))


def micro_batches_on(bench: Bench, sizes) -> None:
    """Seconds, MFU and memory of each pass, over the prompts of a micro-batch."""
    args, n = bench.args, bench.args.samples[0]
    P, R, cuda = args.prompt_tokens, args.response_tokens, args.device == "cuda"
    titles("prompts", "--micro_batch_tokens", "a score, s", "reward, s", "step, s", "step's MFU",
           "peak GB, Adam's moments too")
    for B in sizes:
        tokens = math.ceil(B * (P + n * R * (1 + args.vocabulary / 2**16)))
        took = []
        try:
            for stage in ("scoring", "reward", "step"):
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                with torch.set_grad_enabled(stage == "step"):
                    run = {stage: bench.race(stage, B, n)["packed"]}
                    took.append(bench.seconds(run)[stage])
        except torch.OutOfMemoryError:
            table(B, tokens, "out of memory", "", "", "", "")
            return
        mfu = 6 * bench.parameters * B * (P + n * R) / took[-1] / bench.rates[0] if cuda else "-"
        table(B, tokens, *took, mfu, (bench.bytes_used(peak=True) + 8 * bench.parameters) / 1e9)


def sampling_on(bench: Bench, sizes) -> None:
    """Tokens a second, and the bandwidth that weights and cache take as a share of a copy's."""
    args, n = bench.args, bench.args.samples[0]
    titles("prompts sampled for", "s", "ms a pass", "tokens/s", "share of the bandwidth", "peak GB")
    for B in sizes:
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            took = bench.seconds({"s": bench.race("sampling", B, n)["packed"]})["s"]
        cache = 2 * args.layers * args.hidden * B * (args.prompt_tokens
                                                     + n * args.response_tokens / 2)
        bytes_read = 2 * args.response_tokens * (bench.parameters + cache)
        share = bytes_read / took / bench.rates[1] if args.device == "cuda" else "-"
        table(B, took, 1e3 * took / args.response_tokens, B * n * args.response_tokens / took,
              share, bench.bytes_used(peak=True) / 1e9)


def precision(bench: Bench, B: int) -> None:
    """bf16 against fp32: scores, gradients, the sampler, and a prior that equals the policy."""
    n, R = bench.args.samples[0], bench.args.response_tokens
    prompts = bench.draw(B, bench.args.prompt_tokens)

    def autocast():
        return torch.autocast(bench.args.device, torch.bfloat16)

    with torch.no_grad(), autocast():
        ids, sampled = brain.sample(bench.policy, prompts, n, R, eos_id=-1)
        batch = brain.pack(prompts, ids, bench.args.device)
        prior = brain.freeze(copy.deepcopy(bench.policy), torch.bfloat16)
        policy = copy.deepcopy(prior).float()
        p, q = (brain.sequence_log_prob(model, batch) for model in (prior, policy))
        scored = brain.sequence_log_prob(bench.policy, batch)
    sides = []
    for context in (autocast, contextlib.nullcontext):
        with context():
            log_q = brain.sequence_log_prob(bench.policy, batch)
        (log_q * torch.linspace(-1, 1, n, device=log_q.device)).sum().backward()
        sides.append((log_q.detach(), torch.cat([x.grad.flatten() for x in
                                                 bench.policy.parameters()])))
        bench.policy.zero_grad()
    (a, g), (b, h) = sides
    batch.scores.update(log_prior=p, log_proposal=q, reward=torch.randn_like(p), **dict.fromkeys(
        ("raw_reward", "eos_share", "response_tokens"), p))
    run = SimpleNamespace(cfg=brain.Config(), autocast=autocast, require=lambda *_: None,
                          device=bench.args.device)
    twice = []
    for _ in range(2):
        brain.run_losses(run, bench.policy, [batch], brain.policy_loss)
        twice.append([weight.grad for weight in bench.policy.parameters()])
        bench.policy.zero_grad()
    titles("bf16 against fp32", "found", "expected")
    table("a gradient computed twice: equal", str(all(map(torch.equal, *twice))), "True")
    table("a response's log q, s.d., nats", (a - b).std().item(), "0.05 to 0.4")
    table("its gradient, relative", ((g - h).norm() / h.norm()).item(), "0.01 to 0.05")
    table("log prior − log policy of equal weights, s.d., nats", (p - q).std().item(), "0")
    table("with gradients and without: equal", str(torch.equal(scored, a)), "True")
    table("sampled − scored, rms, nats a root token", ((sampled - scored).square().mean() / R)
          .sqrt().item(), "0.01 to 0.05; stops at 0.15")
    table("and its drift, nats a token", abs((sampled - scored).mean().item()) / R,
          "below 0.002; stops at 0.01 and more")


def profile(bench: Bench, B: int) -> None:
    """How busy the card is, and with what: what is left to mend."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
        bench.args.device == "cuda")
    prompts, n = bench.draw(B, bench.args.prompt_tokens), bench.args.samples[0]
    runs = {"4 sampled tokens": lambda: brain.sample(bench.policy, prompts, n, 4, eos_id=-1),
            "a step": bench.race("step", B, n)["packed"]}
    titles("profile of", "s", "card busy, share", "launches", "kernels with most of the time")
    for what, run in runs.items():
        bench.seconds({what: run})
        with torch.profiler.profile(activities=activities) as found, bench.autocast():
            start = bench.wait()
            run()
            took = bench.wait() - start
        launches = sum(event.count for event in found.key_averages() if "LaunchKernel" in event.key)
        cost = collections.Counter()
        for event in found.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:  # kernels, not who asked
                cost[event.name] += event.device_time_total / 1e6
        table(what, took, cost.total() / took, launches, ", ".join(
            f"{seconds / took:.2f} {name[:40]}" for name, seconds in cost.most_common(4)))


def stopped(device: str, folder: str) -> None:
    """A run that is stopped and continued against a whole one, step by step: the toy on a card."""
    found, real = [], brain.policy_loss
    flags = dict(task="toy", device=device, steps=40, save_every=4, prompts_per_step=32,
                 prompts_per_refresh=64, samples_per_prompt=8, lr=2e-3, max_response_tokens=4,
                 max_prompt_tokens=16, max_comparison_tokens=4)
    if device == "cpu":
        for part in new_toy():
            part.save_pretrained(f"{folder}/prior")
        Path(folder, "judge.py").write_text("def reward(x, y, z): return [len(t) for t in y]")
        for split in ("train", "test"):
            write_lines(Path(folder, f"{split}.jsonl"), [dict(prompt="sun the moon")] * 8)
        flags |= dict(task="jsonl", data_dir=folder, prior=f"{folder}/prior", steps=10,
                      reward=f"{folder}/judge.py", max_response_tokens=2, prompts_per_step=4,
                      prompts_per_refresh=8)
    for name, stops in (("whole", [None]), ("broken", [7, None])):
        for stop in stops:
            count = itertools.count()

            def loss(*args, stop=stop, count=count):
                if next(count) == stop:
                    raise KeyboardInterrupt
                return real(*args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(brain, "policy_loss", loss)
                run = launch(Path(folder, name), **flags)
            assert run.status == (0 if stop is None else 130), run.stderr
        found.append(run.metrics())
    same = [a == b for a, b in zip(*found, strict=True)]
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(*found, strict=True))
    titles("a stopped run", "found", "expected")
    table("steps with equal figures", f"{sum(same)} of {len(same)}", f"{len(same)} of {len(same)}")
    table("largest gap of the loss", gap, "0")
    table("exact KL to the posterior, nats, start and end", "{kl_to_posterior_start:.3f}, "
          "{kl_to_posterior_end:.3f}".format(**run.result()), "")


def measure_gpu(argv: list[str]) -> None:
    """Markdown tables of all that a card can tell; flags are the benchmark's."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = torch.cuda.is_available() and "cpu" not in argv
    args = parse_bench((ON_A_GPU if cuda else IN_SMALL) + argv)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.enable_cudnn_sdp(True)
    bench = Bench(args)
    with torch.no_grad():  # a spread as of trained weights
        for name, weight in bench.policy.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.07 if name.startswith("embed_out") else 0.04)
    print(f"{bench.name}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{bench.parameters / 1e6:.1f}M parameters, P {args.prompt_tokens}, R "
          f"{args.response_tokens}, n {args.samples[0]}")
    if not cuda:
        print("no card here: in small and in fp32, to try the program; no figure means anything")
    attention(bench)  # cuDNN's, too
    torch.backends.cuda.enable_cudnn_sdp(False)  # as brain.Run does
    torch.backends.cuda.matmul.allow_tf32 = True
    micro_batches_on(bench, (1, 2, 4, 8, 16, 32) if cuda else (1, 2))
    sampling_on(bench, (4, 32, 96) if cuda else (2,))
    precision(bench, 4 if cuda else 2)
    profile(bench, 8 if cuda else 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    del bench
    with tempfile.TemporaryDirectory() as folder:
        stopped(args.device, folder)


def test_the_gpu_program_runs(capsys):
    """Catches tables that would fail on the day that a card is there."""
    measure_gpu([])
    said = capsys.readouterr().out
    for row in ("| efficient |", "| 2 |", "| bf16 against fp32 |", "| a step |"):
        assert row in said, said
    assert "| log prior − log policy of equal weights, s.d., nats | 0 |" in said, said
    assert "nan" not in said and re.search(r"equal figures \| (\d+) of \1 \|", said), said


PROGRAMS = {"bench": benchmark, "capitals": write_capitals, "compare": print_comparison,
            "compare_hh": print_dialogues, "families": families, "gpu": measure_gpu,
            "kills": print_kills, "beside": work_beside, "prompt": print_prompt, "trl": race_trl}


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        PROGRAMS[sys.argv[1]](sys.argv[2:])
    else:
        sys.exit(f"python test_brain.py {'|'.join(PROGRAMS)} [--help]; the tests: make test")
