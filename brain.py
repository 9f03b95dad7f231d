"""BRAIn: Bayesian reward-conditioned amortized inference, in one file (arXiv 2402.02479).

Condition the supervised model p(y|x) on "this answer is good", G = 1, where a reward model r gives
p(G=1|x, y) ∝ exp(r(x, y)/kl_coef). By Bayes' rule the posterior is p(y|x, G=1) ∝
p(y|x)·exp(r(x, y)/kl_coef), the optimum of E_q[r] − kl_coef·KL(q‖p). It is known up to a constant
but cannot be sampled from, so distil it: draw n answers to a prompt from a proposal q′, the policy
of a moment ago, weigh them by self-normalised importance sampling (SNIS), step on KL(α̂ ‖ β̂):

    α̂ = softmax(log p + r/kl_coef − log q′)   is the posterior's share of each of the n answers,
    β̂ = softmax(log q_θ − log q′)             the policy's share, a self-normalised baseline, and
    −Σᵢ (α̂ᵢ − β̂ᵢ) ∇log q_θ(yᵢ)                the gradient: exactly 0 once the policy is right.

Legend: B prompts (b in a micro-batch) of P tokens, n responses of R tokens to each, V vocabulary.
    log_prior   p, the supervised (SFT) model     log_proposal  q′, which sampled the responses
    log_policy  q_θ, the model being trained      reward        r(x, y), from the reward model
    A log-probability is of a whole response, in nats, summed over its tokens with its end.

Stages of `python brain.py --task toy|tldr|hh|jsonl`; a checkpoint that is given skips its stage:
    1 sft     fine-tune --base on the references               out/TASK/prior,  or --prior
    2 reward  train a reward model on the comparisons          out/TASK/reward, or --reward
    3 brain   3.1 sample  3.2 score  3.3 weigh  3.4 step       out/TASK/policy
    4 eval    fresh samples on held-out prompts                out/TASK/report.md

Departures from the paper:
    1 Its hyper-parameters could not be reached: the defaults are our own.
    2 Prior, policy and posterior all use softmax(logits/temperature), 0.7 on tldr.
    3 The proposal is the policy of the last refresh; the abstract describes --proposal prior.
    4 log q′ is scored again by the proposal, not the sampler's own sum: rounding cancels in β̂.
    5 A response without an end pays missing_eos_penalty; sft averages nats over tokens.
"""

import contextlib
import copy
import gzip
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal

import filelock
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import file_download, utils
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass(frozen=True)
class Config:
    """A run. Each field is a flag, its comment the flag's help; default < task's preset < flag."""
    task: str = "toy"  # toy, tldr, hh or jsonl: what to learn, from which files (see TASKS)
    out: str | None = None  # the run's folder; out/TASK by default
    check: bool = False  # print the derivation checks, nothing else
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    seed: int = 0  # reaches every draw
    # data and models
    base: str | None = None  # hub name or folder of a model to fine-tune into the prior
    prior: str | None = None  # hub name or folder of a supervised model: skips stage 1
    reward: str | None = None  # the same of a reward model, or FILE.py: skips stage 2
    data_dir: str | None = None  # where the data files lie, and where downloads go
    hh_subsets: str = "harmless-base helpful-base"  # folders of hh, separated by spaces
    # limits
    max_prompt_tokens: int = 512  # longer prompts are skipped; tldr cuts its posts
    max_response_tokens: int = 128  # limit of sampling and of sft, the end included
    max_comparison_tokens: int = 256  # limit of answers for a reward model, and of references
    micro_batch_tokens: int = 16384  # a pass; one of a response counts 1 + V/2¹⁶, for logits
    save_every: int = 100  # steps between saved states, rounded up to whole refreshes
    # stages 1 and 2
    sft_lr: float = 1e-5  # first learning rate of stage 1; each decays linearly to 0
    sft_batch: int = 64  # references a step
    sft_epochs: int = 1  # passes over the references
    reward_lr: float = 3e-6  # first learning rate of stage 2
    reward_batch: int = 64  # pairs a step
    reward_epochs: int = 1  # passes over the comparisons
    # stage 3
    lr: float = 1e-6  # first learning rate of stage 3
    steps: int = 1000  # optimizer steps of stage 3
    samples_per_prompt: int = 8  # n, at least 2
    prompts_per_step: int = 32  # prompts a step of stage 3
    prompts_per_refresh: int = 128  # prompts sampled at a refresh: a multiple of the above
    temperature: float = 1.0  # after sft, every model is softmax(logits / temperature)
    missing_eos_penalty: float = 1.0  # reward units, off a response without an end
    kl_coef: float = 0.5  # reward units that a nat of KL to the prior costs; small is greedy
    target: Literal["posterior", "argmax"] = "posterior"  # alpha: the posterior, or the best sample
    baseline: Literal["none", "unnormalized", "self_normalized"] = "self_normalized"  # brain_loss
    divergence: Literal["forward", "reverse", "log_variance"] = "forward"  # brain_loss
    proposal: Literal["lagged", "prior"] = "lagged"  # who samples: the policy, or the prior
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    # evaluation
    eval_prompts: int = 256  # held-out prompts, at least 3
    eval_samples: int = 4  # responses to each of them, at least 2

# ---- The paper: functions of (B, n) log-probabilities and rewards, and checks of its equations --
STANDARD = ("posterior", "self_normalized")  # target and baseline that the other divergences need
Weights = namedtuple("Weights", "alpha_hat beta_hat")  # shares of the n samples, rows sum to 1
Check = namedtuple("Check", "name claim error tolerance ok")  # error: largest absolute difference

def snis_weights(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
                 kl_coef: float, target: str = "posterior") -> Weights:
    """α̂ of the posterior and β̂ of the policy (paper, 4), (B, n), from log-probabilities of whole
    responses, in nats, and rewards. ValueError: unequal shapes, kl_coef ≤ 0 or unknown target."""
    if not log_policy.shape == log_prior.shape == log_proposal.shape == reward.shape:
        raise ValueError("log_policy, log_prior, log_proposal and reward need one shape, (B, n)")
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be positive, not {kl_coef}")

    if target == "posterior":  # p(y|x, G=1) ∝ p(y|x)·exp(r/kl_coef), over q′; Z(x) cancels
        alpha_hat = (log_prior + reward / kl_coef - log_proposal).softmax(-1)  # (B, n)
    elif target == "argmax":  # all weight on the highest reward, ties share: kl_coef near 0
        alpha_hat = F.normalize((reward == reward.amax(-1, keepdim=True)).to(reward), 1, -1)
    else:
        raise ValueError(f"target must be posterior or argmax, not {target!r}")
    return Weights(alpha_hat, beta_hat=(log_policy - log_proposal).softmax(-1))

def brain_loss(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
               kl_coef: float, *, target: str = "posterior", baseline: str = "self_normalized",
               divergence: str = "forward") -> tuple[Tensor, Weights]:
    """BRAIn's loss, KL(α̂ ‖ β̂) by default, per prompt (B,) in nats, and the detached weights.

    It is Σ α̂ (log nα̂ − ρ) + A(ρ), with the gradient −Σᵢ (α̂ᵢ − bᵢ) ∇log q_θ(yᵢ). All inputs but
    log_policy are detached. A(ρ) estimates log Σ_y q_θ(y|x) = 0; its slope in ρ is the baseline b:

        baseline          A(ρ), ρ = log q_θ − log q′    b           as in
        none              0                             0           DPG
        unnormalized      mean exp(ρ) − 1               exp(ρ)/n    GDC++
        self_normalized   log mean exp(ρ)               β̂           BRAIn

    Divergence "reverse" is KL(β̂ ‖ α̂), the policy-gradient side. "log_variance" is half the
    variance of log p + r/kl_coef − log q_θ over the samples: VarGrad, RLOO's gradient. Both need
    the default target and baseline: else ValueError, as for what snis_weights refuses."""
    log_prior, log_proposal, reward = log_prior.detach(), log_proposal.detach(), reward.detach()
    alpha, beta = snis_weights(log_policy, log_prior, log_proposal, reward, kl_coef, target)
    rho = log_policy - log_proposal  # (B, n) ρ = log q_θ − log q′
    n = rho.shape[-1]

    normaliser = {"none": 0,  # A(ρ), (B,)
                  "unnormalized": rho.exp().mean(-1) - 1,
                  "self_normalized": rho.logsumexp(-1) - math.log(n)}
    if divergence == "forward" and baseline in normaliser:  # with 0·log 0 = 0
        loss = (torch.xlogy(alpha, n * alpha) - alpha * rho).sum(-1) + normaliser[baseline]
    elif divergence == "reverse" and (target, baseline) == STANDARD:
        log_alpha = (log_prior + reward / kl_coef - log_proposal).log_softmax(-1)  # (B, n)
        loss = (beta * (rho.log_softmax(-1) - log_alpha)).sum(-1)  # (B,)
    elif divergence == "log_variance" and (target, baseline) == STANDARD:  # q′ plays no part
        loss = (log_prior + reward / kl_coef - log_policy).var(-1) / 2  # (B,), divisor n − 1
    else:
        raise ValueError(f"no loss has {target=}, {baseline=}, {divergence=}")
    return loss, Weights(alpha, beta.detach())

def bradley_terry_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """−log P(chosen ≻ rejected) = −log σ(Δr) per pair (B,): P(y₁ ≻ y₂) = g₁/(g₁+g₂), g = exp(r)."""
    return -F.logsigmoid(reward_chosen - reward_rejected)  # (B,)

def effective_sample_size(weights: Tensor) -> Tensor:
    """Kish's 1/Σᵢwᵢ² per prompt (B,) of weights (B, n) that sum to 1: between 1 and n."""
    return 1 / weights.square().sum(-1)

def derivation_checks() -> list[Check]:
    """Autograd's gradient of each loss against its formula, which is in exp and sums; float64."""
    drawn = torch.randn(4, 3, 5, dtype=torch.float64, generator=make_generator("checks"))
    (q, p, q1, r), kl_coef, n = drawn, 0.7, 5
    q2, p2, _, r2 = drawn[..., :2]  # two samples of the prior, for DPO
    ratio, w = (q - q1).exp(), r - kl_coef * (q - p)  # exp(ρ) = q_θ/q′; PPO's reward with its KL
    alpha = F.normalize((p + r / kl_coef - q1).exp(), 1, -1)  # divided by the sum over n
    beta = F.normalize(ratio, 1, -1)
    sign = (r2 - r2.flip(-1)).sign()  # +1 chosen, −1 rejected
    margin = (sign * (q2 - p2)).sum(-1, keepdim=True)  # Δ log(q_θ/p)
    claims = [
        ("baseline", "none", "−Σ α̂ ∇log q_θ: DPG", -alpha),
        ("baseline", "unnormalized", "−Σ (α̂ − exp(ρ)/n) ∇log q_θ: GDC++", ratio / n - alpha),
        ("baseline", "self_normalized", "−Σ (α̂ − β̂) ∇log q_θ: BRAIn", beta - alpha),
        ("target", "argmax", "of −log σ(Δ log(q_θ/p)): DPO-sft's", -sign / (1 + margin.exp())),
        ("divergence", "reverse", "−Σ β̂ (w − Σ β̂w) ∇log q_θ / kl_coef: PPO's, (n−1)/n of RLOO's",
         -beta * (w - (beta * w).sum(-1, keepdim=True)) / kl_coef),
        ("divergence", "log_variance", "−Σ (w − w̄)/(n − 1) ∇log q_θ / kl_coef: RLOO's",
         (w.mean(-1, keepdim=True) - w) / (n - 1) / kl_coef)]

    checks = []
    for dial, name, claim, gradient in claims:
        log_policy, *given = (q2, p2, p2, r2) if dial == "target" else (q, p, q1, r)
        loss, _ = brain_loss(log_policy.requires_grad_(), *given, kl_coef, **{dial: name})
        found, = torch.autograd.grad(loss.sum(), log_policy)
        error = (found - gradient).abs().max().item()
        checks.append(Check(name, claim, error, 1e-12, error <= 1e-12))
    return checks

# ---- Command line, and errors told in one line --------------------------------------------------
class Stop(Exception):
    """A user's mistake: ends the program with one line, and status 2."""

class Guard(Stop):
    """A number that cannot be trusted, or a disk that is full: status 1, as for any other error."""

def refuse_if(wrong, why):
    if wrong:
        raise Stop(why)

def out_of_memory(error):
    """Whether memory ran out; on a CPU torch calls that a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

def one_line(error):
    """What an error says, in one line."""
    if out_of_memory(error):
        return "out of memory: lower --micro_batch_tokens, --samples_per_prompt or --max_…_tokens"
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, Stop | OSError) else f"{type(error).__name__}: {said}"

@contextlib.contextmanager
def explain(what, kind=Stop):
    """What fails inside (memory apart) ends the program with one line: `what`, and why."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        lines = {frame.filename: f":{frame.lineno}" for frame in inspect.trace(0)}  # of a FILE.py
        raise kind(f"{what}{lines.get(str(what), '')}: {one_line(error)}") from error

def parse_config(argv: list[str] | None = None) -> Config:
    """The resolved configuration of a command line, or Stop, before anything is loaded."""
    parser = transformers.HfArgumentParser(Config, add_help=False, allow_abbrev=False)
    parser.error = partial(refuse_if, True)  # one line, no usage text
    given, _ = parser.parse_known_args(argv)  # what the user said, without a preset
    refuse_if(given.task not in TASKS, f"--task must be one of {', '.join(TASKS)}")
    preset = TASKS[given.task].preset | dict(out=f"out/{given.task}")
    if given.base:  # it becomes the prior, and no preset's reward model knows it
        preset |= dict(prior=None, reward=None)
    parser.set_defaults(**preset)
    parser.add_argument("-h", "--help", action="help")
    parser.format_help = lambda: f"{inspect.getsource(Config)}\n{given.task}'s preset: {preset}\n"
    cfg = Config(**vars(parser.parse_args(argv)))

    low = dict(seed=0, missing_eos_penalty=0, samples_per_prompt=2, eval_samples=2, eval_prompts=3)
    for name, value in asdict(cfg).items():
        refuse_if(value == "" or not str(value).isprintable(), f"--{name} is empty or unprintable")
        least = low.get(name, 1 if type(value) is int else 1e-12)
        refuse_if(type(value) in (int, float) and not least <= value <= 1e9,
                  f"--{name} must be between {least} and 1e9, not {value}")
    refuse_if(cfg.base and cfg.prior, "--base is fine-tuned into the prior: give only one of them")
    refuse_if(cfg.task != "toy" and not (cfg.base or cfg.prior), "--base or --prior is needed")
    refuse_if(cfg.prompts_per_refresh % cfg.prompts_per_step,
              "--prompts_per_refresh must be a multiple of --prompts_per_step")
    refuse_if(cfg.divergence != "forward" and (cfg.target, cfg.baseline) != STANDARD,
              f"--divergence {cfg.divergence} needs --target posterior, --baseline self_normalized")
    return cfg

# ---- Data: four tasks, one Example; texts and ids -----------------------------------------------
TLDR, TURN = "\n\nTL;DR:", "\n\nAssistant:"
KEYS, FILLERS = "sun moon star rain".split(), "the a of in".split()
Example = namedtuple("Example", "prompt reference chosen rejected", defaults=[None] * 3)
# Texts or None; a prompt may be chat messages. An answer brings its leading space, if any.

def read_files(parse, pattern, source, cfg, split, tokenizer):
    """Yields parse(row, limit, tokenizer) of JSON lines in --data_dir; source has absent files."""
    names = [pattern.format(split=split, subset=subset) for subset in cfg.hh_subsets.split()]
    for name in dict.fromkeys(names):  # a pattern without a subset names one file
        path, url = Path(cfg.data_dir, name), f"{source}/{name}"
        with explain(f"{path} (--data_dir names its folder)"):
            if source and not path.exists():
                print(f"fetching {url} to {path}")
                os.makedirs(path.parent, exist_ok=True)
                with explain(url), open(f"{path}.part", "wb") as part:
                    file_download.http_get(url, part)  # which checks its length
                os.replace(part.name, path)
            unpack = gzip.decompress if path.suffix == ".gz" else bytes  # refuses a truncated .gz
            lines = unpack(path.read_bytes()).splitlines()  # bytes, as they may begin with a BOM

        for number, line in enumerate(lines, 1):
            if line.strip():
                with explain(f"{path}:{number}"):
                    example = parse(json.loads(line), cfg.max_prompt_tokens, tokenizer)
                    json.dumps(example, ensure_ascii=False).encode()  # refuses lone surrogates
                yield example

def text_at(row, key, kinds=str):
    """row[key], which must be a text, or of these kinds."""
    value = row.get(key) if isinstance(row, dict) else None
    refuse_if(not isinstance(value, kinds), f"{key} is absent, or no text")
    return value

def parse_example(row, limit, tokenizer):
    """A user's row, of Example's fields: texts, or lists of chat messages as TRL writes them."""
    given = {key: text_at(row, key, str | list | None) for key in Example._fields}
    refuse_if(not str(given["prompt"] or "").strip(), "a row must be an object with a prompt")
    refuse_if([given["chosen"], given["rejected"]].count(None) == 1, "chosen, rejected: give both")
    for key, turns in given.items():
        if isinstance(turns, list):
            with explain(key):
                texts = [text_at(turn, name) for turn in turns for name in ("role", "content")]
                refuse_if(key == "prompt" and texts[-2] == "assistant", "it ends with an answer")
                refuse_if(key != "prompt" and len(turns) != 1, "an answer must be one message")
            given[key] = turns if key == "prompt" else texts[1]
    return Example(**given)

def parse_dialogue(row, limit, tokenizer):
    """A row of HH, cut at its last turn; None where prompts differ or an answer is empty."""
    prompt, turn, chosen = text_at(row, "chosen").rpartition(TURN)
    other, _, rejected = text_at(row, "rejected").rpartition(TURN)
    if prompt == other and turn and chosen.strip() and rejected.strip():
        return Example(prompt + turn, chosen, chosen, rejected)

def parse_post(row, limit, tokenizer):
    """A post as a query, cut as OpenAI did: at newlines, and within its first line at any place."""
    head = f"SUBREDDIT: r/{text_at(row, 'subreddit')}\n\nTITLE: {text_at(row, 'title')}\n\nPOST: "
    post, summary = text_at(row, "post"), text_at(row, "summary").strip()
    while post and (over := len(tokenizer(head + post + TLDR).input_ids) - limit) > 0:
        post = post[: len(post) + 1 - math.ceil(over / 4)]  # a character is 4 tokens at most
        post = post[: post.rfind("\n")]  # its last character, if there is no newline: −1
    return Example(head + post + TLDR, f" {summary}") if summary else None

def read_toy(cfg, split, tokenizer):
    """Yields prompts of six words, some of them key words: a good summary lists each of these."""
    rng = random.Random(f"{cfg.seed} {split}")
    for _ in range(2048 if split == "train" else 512):
        keys = rng.sample(KEYS, rng.randint(1, 3))
        words = [*rng.sample(keys + rng.choices(FILLERS, k=6 - len(keys)), 6), TLDR.strip()]
        drafts = [rng.sample(keys, len(keys)) for _ in range(3)]  # reference, chosen, rejected
        for draft in drafts * 2:  # each may slip twice: a word too many, wrong, or one for two
            if rng.random() < 0.5:
                at = rng.randrange(len(draft))
                draft[at : at + rng.randrange(3)] = [rng.choice(KEYS + FILLERS)]
        worth = [2 * len(set(draft) & set(keys)) - len(draft) for draft in drafts]
        if rng.random() < 1 / (1 + math.exp(2 * (worth[1] - worth[2]))):  # σ(2Δworth): the judge
            drafts[1:] = drafts[2], drafts[1]  # is noisy, and may choose the worse one
        yield Example(*map(" ".join, [words, *drafts]))

# A task is one entry here: read(cfg, split, tokenizer) yields Examples, None for a broken row, and
# preset is what differs from Config, for tldr and hh with 1B checkpoints on an H100.
Task = namedtuple("Task", "read preset")
TASKS = {
    "toy": Task(read_toy, dict(
        max_prompt_tokens=16, max_response_tokens=4, max_comparison_tokens=4, sft_lr=3e-3, lr=2e-3,
        sft_epochs=4, reward_lr=1e-3, reward_epochs=4, steps=400, kl_coef=0.4, save_every=50,
        prompts_per_refresh=64)),
    "tldr": Task(partial(read_files, parse_post, "datasets/tldr_3_filtered/{split}.jsonl",
                         "https://openaipublic.blob.core.windows.net/summarize-from-feedback"),
                 dict(data_dir="data/tldr", prior="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
                      reward="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr", sft_lr=3e-6,
                      sft_batch=128, temperature=0.7, device="cuda", max_response_tokens=53,
                      max_comparison_tokens=169)),
    "hh": Task(partial(read_files, parse_dialogue, "{subset}/{split}.jsonl.gz",
                       "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"),
               dict(data_dir="data/hh-rlhf", prior="lomahony/eleuther-pythia1b-hh-sft")),
    "jsonl": Task(partial(read_files, parse_example, "{split}.jsonl", None), dict(data_dir="data"))}

def load_task(cfg: Config, split: str, tokenizer) -> list[Example]:
    """A split, train or test, less broken rows and long prompts, which are counted; or Stop."""
    rows = list(tqdm(TASKS[cfg.task].read(cfg, split, tokenizer), f"reading {split}", disable=None))
    examples = [row for row in rows if row
                and 0 < len(encode_prompt(tokenizer, row.prompt)) <= cfg.max_prompt_tokens]
    broken = rows.count(None)
    said = (f"{cfg.task} {split}: {len(examples)} of {len(rows)} rows; left out: {broken} broken, "
            f"{len(rows) - broken - len(examples)} empty or over --max_prompt_tokens")
    print(said)
    refuse_if(len(examples) < (3 if split == "test" else 1), f"too few rows, test needs 3: {said}")
    return examples

def render(tokenizer, prompt, answer=None):
    """The text of a prompt, or of an answer to it; of a chat, as the tokenizer's template says."""
    if isinstance(prompt, str):
        return prompt if answer is None else answer
    template = partial(tokenizer.apply_chat_template, tokenize=False)
    with explain(f"the chat template does not take {str(prompt)[-99:]}"):
        text = template(prompt, add_generation_prompt=True)
        if answer is None:
            return text
        whole = template([*prompt, {"role": "assistant", "content": answer}])
        refuse_if(not whole.startswith(text), "before an answer, it writes a prompt in another way")
    return whole.removeprefix(text)

def encode_prompt(tokenizer, prompt):
    """Ids of a prompt; where tokenizer and chat template both write a BOS, it stands there once."""
    first = tokenizer.decode(tokenizer("").input_ids)
    return tokenizer(render(tokenizer, prompt).removeprefix(first)).input_ids

def encode_after(tokenizer, text):
    """Ids of a text behind a prefix, less the prefix's: alone, SentencePiece would add a space."""
    for prefix in ("\n", "a", ""):  # the first that does not merge with the text
        ids, known = tokenizer([prefix + text, prefix], add_special_tokens=False).input_ids
        if ids[: len(known)] == known:
            return ids[len(known) :]

def until_end(ids, ends):
    """Ids up to and with the first of the ends."""
    return ids[: next((i for i, token in enumerate(ids, 1) if token in ends), None)]

def encode_response(tokenizer, prompt, answer, ends, limit):
    """Ids of a given answer and its first end, the tokenizer's own if it has none, cut to limit."""
    ids = encode_after(tokenizer, render(tokenizer, prompt, answer))
    return until_end([*ids, tokenizer.eos_token_id], ends)[:limit]

def response_text(tokenizer, ids, ends, skip=True):
    """What a response says before its end, decoded behind an a, or SentencePiece drops a space."""
    decode = partial(tokenizer.decode, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = [token for token in until_end(ids, ends) if token not in ends]
    return decode(before + ids).removeprefix(decode(before))

def check_texts(tokenizer, examples):
    """Stop unless texts read back as given, but for Unicode forms and spaces at special tokens."""
    name, special = tokenizer.name_or_path, "|".join(map(re.escape, tokenizer.get_added_vocab()))
    normal = tokenizers.normalizers.NFKC().normalize_str
    for prompt, *answers in examples:
        for answer in (None, *answers):  # None is the prompt
            text = render(tokenizer, prompt, answer)
            read = response_text(tokenizer, encode_after(tokenizer, text), [], skip=False)
            given, read = (re.sub(rf"^ |\s*({special})\s*", r"\1", normal(x)) for x in (text, read))
            refuse_if(given != read, f"{name}: its tokenizer reads {given[:60]!r} as {read[:60]!r}")

# ---- Models, and one layout for all of them: one prompt, n branches -----------------------------
# The n responses to a prompt are its branches. The prompt's keys and values are computed once, into
# a cache; then the branches are fed, g to a row. Each begins with the prompt's last token x₃, whose
# output predicts y₁. Here are g = 2 branches a and b, padding ·, and who sees (#) what:
#                        x₁ x₂ ·     x₃ᵃ y₁ᵃ y₂ᵃ x₃ᵇ y₁ᵇ y₂ᵇ       (cache, then row of branches)
#          predicts y₂ᵃ  #  #        #   #
#          predicts y₂ᵇ  #  #                    #   #
# A token's position is how many others it sees. Scoring feeds branches, sampling a token of each.

@dataclass
class Batch:
    """B prompts with n responses each, and what becomes known of the responses, (B, n) each."""
    prompt: Tensor  # (B, P) ids without the last one, padded by one −1 or more
    branch: Tensor  # (B, n, 1 + R) ids: the prompt's last one, then the response's, padded
    length: Tensor  # (B, n) tokens of each response
    responses: list  # the responses' ids
    examples: list | None = None  # the Examples of which the prompts are
    log_sampled: Tensor | None = None  # log q′, by the sampler itself
    log_prior: Tensor | None = None  # log p, scored
    log_proposal: Tensor | None = None  # log q′, scored
    reward: Tensor | None = None  # less the penalty
    figures: dict | None = None  # what is reported of each response

def pack(prompts, responses, device="cpu") -> Batch:
    """Ids of B prompts, n responses each. pack([[5, 6, 7]], [[[8, 0], [9]]]): prompt [[5, 6, −1]],
    branch [[[7, 8, 0], [7, 9, −1]]] and length [[2, 1]]. ValueError: no prompt, or a ragged n."""
    if not all(prompts) or len({len(ys) for ys in responses}) != 1:
        raise ValueError("pack needs prompts of a token or more, and n responses to each")
    rows = [x[-1:] + y for x, ys in zip(prompts, responses, strict=True) for y in ys]  # (B·n)
    pad = partial(itertools.zip_longest, fillvalue=-1)  # gives columns
    prompt = torch.tensor([*pad(*[(*x[:-1], -1) for x in prompts])], device=device).T
    branch = torch.tensor([*pad(*rows)], device=device).T.unflatten(0, (len(prompts), -1))
    return Batch(prompt, branch, (branch >= 0).sum(-1) - 1, responses)

def forward(model, cache, prompt_mask, tokens, branch_mask):
    """The model's output for tokens (rows, T), which see what masks (rows, P), (T, T′) allow."""
    rows, T = tokens.shape
    seen = torch.cat([prompt_mask[:, None].expand(-1, T, -1), branch_mask.expand(rows, -1, -1)], -1)
    # Eager attention adds the mask to its scores; the least bf16 is finite in fp32, too.
    mask = torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).to(model.dtype)
    return model(tokens.clamp(min=0), attention_mask=mask[:, None], use_cache=True,
                 position_ids=seen.sum(-1) - 1, past_key_values=cache)

def prefill(model, prompt, cache):
    """Fills a cache with the prompts (B, P), differentiably; returns their mask (B, P)."""
    mask = prompt >= 0
    forward(model.base_model, cache, mask[:, :0], prompt, mask.new_ones(mask.shape[1:] * 2).tril())
    return mask

def forward_branches(model, batch, tokens):
    """The model's output for branches (B, n, T), with gradients; 4 to a row is the fastest."""
    n, T = tokens.shape[1:]
    g, cache = math.gcd(n, 4), transformers.DynamicCache()
    mask = prefill(model, batch.prompt, cache).repeat_interleave(n // g, 0)  # (B·n/g, P)
    cache.batch_repeat_interleave(n // g)
    own = torch.block_diag(*[mask.new_ones(T, T).tril()] * g)  # (gT, gT)
    return forward(model, cache, mask, tokens.reshape(-1, g * T), own)

def sequence_log_prob(model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log q(y|x) of each response, (B, n), in nats, fp32, differentiable."""
    target = batch.branch[..., 1:]  # (B, n, R)
    logits = forward_branches(model, batch, batch.branch[..., :-1]).logits.flatten(0, 1).float()
    nats = F.cross_entropy(logits / temperature, target.ravel(), ignore_index=-1, reduction="none")
    return -nats.view_as(target).sum(-1)  # nats (B·n·R,) are 0 on padding

def score_reward(reward_model, batch: Batch) -> Tensor:
    """The raw reward of each response, (B, n), fp32, read at its last token; differentiable."""
    hidden = forward_branches(reward_model.base_model, batch, batch.branch).last_hidden_state
    score = reward_model.score(hidden).float().view_as(batch.branch)  # (B, n, 1 + R)
    return score.gather(-1, batch.length[..., None])[..., 0]

class Columns(transformers.StaticLayer):
    """Keys and values, the prompt's first, in tensors that never move: (B, heads, P + n·R, d)."""
    shown = 0  # columns that are returned

    def update(self, keys, values, *args, **kwargs):
        """Writes columns; returns the filled ones, on a card all: its graph needs fixed shapes."""
        self.shown += self.max_cache_len if self.shown and not keys.is_cpu else keys.shape[2]
        return [x[:, :, : self.shown] for x in super().update(keys.to(values.dtype), values)]

def repeatable(work):
    """Does a card's work; returns its repeat, in one launch unless a kernel makes the host wait."""
    with warnings.catch_warnings(record=True, action="always") as told:
        torch.cuda.set_sync_debug_mode("warn")
        work()  # kernels are chosen, and autocast casts the weights, before the graph is recorded
        torch.cuda.set_sync_debug_mode("default")
    if any("called a synchronizing" in str(warning.message) for warning in told):
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()  # is recorded, not done
    return graph.replay

@torch.no_grad()
def sample(model, prompts, n: int, max_new_tokens: int, *, eos_id, temperature: float = 1.0,
           generator=None) -> tuple[list, Tensor]:
    """n responses to each prompt from softmax(logits / temperature), nothing truncated: ids (B, n),
    with an end (eos_id, or one of several) unless cut, and log q′ (B, n), nats in fp32. Each token
    is where a uniform number falls in the running sum. Of listed generators each has a prompt."""
    generators = generator if isinstance(generator, list) else [generator] * len(prompts)
    uniform = torch.stack([torch.rand(n, max_new_tokens, generator=g, dtype=torch.float64)
                           for g in generators]).to(model.device)  # (B, n, R)
    batch = pack(prompts, [[[]] * n for _ in prompts], model.device)
    columns = batch.prompt.shape[1] + n * max_new_tokens
    cache = transformers.Cache(layer_class_to_replicate=partial(Columns, columns))
    mask, ids = prefill(model, batch.prompt, cache), batch.branch  # (B, P); last ids, (B, n, 1)
    ends = [eos_id] if isinstance(eos_id, int) else eos_id
    stop, own = ids.new_tensor(ends), mask.new_ones(n).diag()  # (n, n): a branch sees its own
    tokens = ids.new_empty(uniform.shape)  # (B, n, R), anything after the end
    log_q, alive = torch.zeros_like(ids).float(), ids >= 0  # (B, n, 1): none has ended
    steps, step = torch.arange(max_new_tokens, device=ids.device), ids.new_zeros(1)  # (R,), (1,)

    def draw():
        """Draws a token of each branch. Tensors change in place, and none is waited for."""
        past = steps[: step + 1 if step.is_cpu else None] <= step  # (R′,)
        seen = (own[:, None] & past[:, None]).flatten(1)  # (n, R′·n)
        output = forward(model, cache, mask, ids.flatten(1), seen)
        log_p = (output.logits.float() / temperature).log_softmax(-1)  # (B, n, V), fp32
        cdf = log_p.double().exp().cumsum(-1)  # (B, n, V), fp64
        u = uniform.index_select(-1, step) * cdf[..., -1:]  # (B, n, 1), may round up to the total
        ids.copy_(torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[-1] - 1))
        log_q.add_(log_p.gather(-1, ids).where(alive, 0))
        tokens.index_copy_(-1, step, ids)
        alive.logical_and_(~torch.isin(ids, stop))
        step.add_(1)

    draw_again = repeatable(draw) if ids.is_cuda else draw
    for i in range(ids.is_cuda, max_new_tokens):  # a card has drawn the first token
        draw_again()
        if i % 8 == 7 and not alive.any():  # to ask is to wait for a card
            break
    return [[*map(partial(until_end, ends=ends), ys)] for ys in tokens.tolist()], log_q[..., 0]

def exact_head(head, hidden):
    """A head computes in fp32 (TF32 from stage 3), as bf16 logits cost 0.2 nats over 53 tokens."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())

def freeze(model, dtype):
    """The model, to score only: with the dtypes of autocast, so equal weights have equal scores."""
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            module.to(dtype)
    return model.requires_grad_(False)

def load(run, kind, name, **new_head):
    """A model of a kind and its tokenizer, or Stop; with num_labels=1 its head is a new one."""
    torch.manual_seed(run.cfg.seed)  # decides the new head
    with explain(f"{name}, a folder or a name on the hub, cannot be used"):
        quantised = "it is quantised: dequantise it, and save it in bf16 or fp32"
        files = [*Path(name).glob("*.gguf"), *Path(name).glob("quant*_config.json")]
        refuse_if(files or name.endswith(".gguf"), quantised)
        refuse_if(transformers.utils.has_file(name, "adapter_config.json"),
                  "it is an adapter: merge it into its base model (peft: merge_and_unload)")
        config, _ = transformers.PreTrainedConfig.get_config_dict(name)
        for part in (config, config.get("text_config") or {}):
            refuse_if(part.get("quantization_config") or part.get("compression_config"), quantised)

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = kind.from_pretrained(name, trust_remote_code=False, dtype=torch.float32,
                                           output_loading_info=True, **new_head)
        stray = sorted(info["missing_keys"] | info["unexpected_keys"])
        refuse_if(stray and not new_head, f"not this kind of model: it lacks, or adds, {stray}")
        return ready(run, copy.deepcopy(model), tokenizer), tokenizer  # copy: aligned, same sums

def ready(run, model, tokenizer):
    """The model frozen, dropout off, its head in fp32, checked on its device, or Stop."""
    ids, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    refuse_if(not plain, "it has no tokenizer")
    refuse_if(len(tokenizer) > model.get_input_embeddings().num_embeddings, "it lacks embeddings")
    refuse_if(not model.can_generate() and model.config.num_labels != 1, "it has not one label")

    for config in (model.config, model.config.get_text_config()):
        config.update(dict(return_dict=True, output_attentions=False, output_hidden_states=False,
                           output_router_logits=False))  # these change what a model returns
    model.eval().requires_grad_(False).to(run.device)
    if head := getattr(model, "score", None) or model.get_output_embeddings():  # a decoder
        refuse_if(tokenizer.eos_token is None, "it has no end-of-text token, eos")
        refuse_if(ids[-len(plain) :] != plain, "its tokenizer puts a special token after a prompt")
        head.forward = partial(exact_head, head.forward)
        check_model(run.cfg, model)
    return model

def check_model(cfg, model):
    """The start check: scores of two prompts' branches against those of plain rows, or Stop."""
    P, text = cfg.max_prompt_tokens, model.config.get_text_config()
    R = max(cfg.max_response_tokens, 0 if model.can_generate() else cfg.max_comparison_tokens)
    context = getattr(text, "max_position_embeddings", None) or P + R

    with explain(f"{model.config.model_type} models cannot run as branches here"):
        refuse_if(P + R > context, f"their context is {context}: lower --max_…_tokens below it")
        ids = torch.randint(text.vocab_size, (9, P + R), generator=make_generator("check")).tolist()
        prompts = [ids[0][:P], ids[0][: P // 8 + 1]]
        responses = [[y[: R - i % R] for i, y in enumerate(ids[1:])]] * 2
        score = sequence_log_prob if model.can_generate() else score_reward
        found = score(model, pack(prompts, responses, model.device))
        for b, i in itertools.product((0, 1), (0, -1)):
            x, y = prompts[b], responses[b][i]
            plain = model(torch.tensor([x + y], device=model.device)).logits[0].float()
            if model.can_generate():  # else it is the reward, at the last token of no padding
                plain = plain[len(x) - 1 : -1].log_softmax(-1)[range(len(y)), y]
            torch.testing.assert_close(found[b, i], plain.sum(), atol=1e-3, rtol=1e-6)  # seen 1e-4

@contextlib.contextmanager
def users_code(path):
    """Runs the code of FILE.py: what it does to torch's defaults ends with it."""
    with torch.no_grad(), explain(path), contextlib.ExitStack() as after:
        after.callback(torch.set_default_dtype, torch.get_default_dtype())
        after.callback(torch.set_default_device, None)
        yield

def judge_texts(path, reward, run, batch):
    """Rewards (b, n), float64, by reward(prompts, responses, references): three lists of b·n."""
    rows = [(copy.deepcopy(x.prompt), response_text(run.tokenizer, y, run.ends), x.reference)
            for x, ys in zip(batch.examples, batch.responses, strict=True) for y in ys]
    with users_code(path), run.autocast(enabled=False):
        found = reward(*map(list, zip(*rows, strict=True)))  # theirs to edit
    with explain(f"{path}: reward() must return {len(rows)} numbers in a list"):
        found = torch.as_tensor(found, dtype=torch.float64, device=run.device)
        refuse_if(found.shape != (len(rows),), f"their shape is {[*found.shape]}")
    return found.view_as(batch.length).clone()  # theirs may change

def load_reward(run, source, prior):
    """What gives a batch its rewards (b, n): a reward model, or the function of FILE.py."""
    if source.endswith(".py"):
        path = Path(source).resolve()
        module = module_from_spec(spec_from_file_location(path.stem, path))
        sys.modules.setdefault(path.stem, module)  # the processes that it starts look for it there
        sys.path.insert(0, str(path.parent))  # its neighbours can be imported
        with users_code(path):
            module.__spec__.loader.exec_module(module)
        reward = getattr(module, "reward", None)
        refuse_if(not callable(reward) or inspect.iscoroutinefunction(reward),
                  f"{path} has no plain reward(prompts, responses, references)")
        return partial(judge_texts, path, reward, run)

    model, own = load(run, AutoModelForSequenceClassification, source)
    its, ours = ((t.get_vocab(), t.eos_token, t(TURN).input_ids) for t in (own, run.tokenizer))
    V, known = (m.get_input_embeddings().num_embeddings for m in (prior, model))
    refuse_if(its != ours or V > known or not hasattr(model, "score"),
              f"{source} does not read the prior's tokens: ask it in a FILE.py (see README)")
    return partial(score_reward, freeze(model, run.dtype))

# ---- A run: its folder, its one state file, its guards ------------------------------------------
class Run:
    """What the stages share. Draws have keys: a killed run needs but state.pt and the exports."""
    free = dict.fromkeys(["data_dir", "save_every", "micro_batch_tokens", "out"])  # may change
    progress = "start"  # later stage and step, for messages
    tokenizer = ends = reward = None  # see prepare
    lock = contextlib.nullcontext()  # on a file system without locks

    def __init__(self, cfg):
        cuda = torch.cuda.is_available() and cfg.device != "cpu"
        refuse_if(cfg.device == "cuda" and not cuda, "there is no CUDA GPU; or give --device cpu")
        torch.backends.cuda.enable_cudnn_sdp(False)  # 0.1 to 3 s for each new shape on an H200
        torch.backends.cuda.matmul.allow_tf32 = False  # the start check is exact
        self.device = "cuda" if cuda else "cpu"
        self.dtype = torch.bfloat16 if cuda else torch.float32  # of frozen matrices and of compute
        self.autocast = partial(torch.autocast, self.device, torch.bfloat16, enabled=cuda)
        self.cfg, self.out = replace(cfg, device=self.device), Path(cfg.out).absolute()
        first = "sft" if not cfg.prior else "brain" if cfg.reward else "reward"
        self.state = dict(stage=first, step=0, metrics="", config=asdict(self.cfg) | self.free,
                          threads=torch.get_num_threads())  # what state.pt holds

        with explain(f"--out {self.out} cannot be used (give another, or remove it)"):
            os.makedirs(str(self.out).encode(), exist_ok=True)  # fails if it is no text
            found = {*os.listdir(self.out)} - {"lock", "state.pt.part"}  # may precede a state
            refuse_if(found and "state.pt" not in found, "it holds no run")
            refuse_if(not os.access(self.out, os.W_OK), "it is write-protected")
            try:
                self.lock = filelock.FileLock(self.out / "lock").acquire(blocking=False)
            except OSError as error:  # a Timeout, or one of some network drives
                refuse_if(isinstance(error, filelock.Timeout), "another process runs there")
                print("warning: --out is on a file system without locks: start no second run there")
            if found:
                self.state = torch.load(self.out / "state.pt", "cpu", weights_only=True)
                old, new = self.state["config"].items(), (asdict(self.cfg) | self.free).items()
                refuse_if(old != new, f"its run was {dict(old - new)}, is {dict(new - old)}")
                torch.set_num_threads(self.state["threads"])  # sums depend on it
        print(f"{self.device}: {self.out}, stage {self.state['stage']}, step {self.state['step']}")

    def save(self, **parts):
        """Replace state.pt in one move: the run's state, with these parts of it."""
        with explain(f"{self.progress}: no room for a state, the last one is kept", Guard):
            with open(self.out / "state.pt.part", "wb") as file:
                torch.save(self.state | parts, file)  # which flushes it
                os.fsync(file.fileno())  # on the disk, before the old one goes
            os.replace(file.name, self.out / "state.pt")

    def export(self, model, name):
        """Write out/NAME, whole or not at all, if it reads back as the model that was trained."""
        tokenizer, part = self.tokenizer, self.out / f"{name}.part"  # renamed when it is whole
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # `generate` in batches
        model.generation_config = transformers.GenerationConfig(  # saved if the model can generate
            do_sample=True, temperature=self.cfg.temperature, top_k=0, top_p=1.0,
            eos_token_id=self.ends, pad_token_id=tokenizer.pad_token_id)
        with explain(f"{self.out / name} cannot be written, the last state is kept", Guard):
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            read = type(model).from_pretrained(part, dtype=torch.float32).state_dict()
            torch.testing.assert_close(read, model.state_dict(), rtol=0, atol=0, check_device=False)
            shutil.rmtree(self.out / name, ignore_errors=True)
            os.replace(part, self.out / name)

# ---- Training: one driver of gradients for texts (stages 1 and 2) and for samples (stage 3) -----
def make_generator(*key):
    """A generator that its key decides, as (seed, stage, …)."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))

def take(examples, first, count, *key):
    """`count` examples, from place `first` of an endless stream, shuffled anew in each epoch."""
    N = len(examples)
    epochs = range(first // N, (first + count) // N + 1)
    order = torch.cat([torch.randperm(N, generator=make_generator(*key, i)) for i in epochs])
    return [examples[i] for i in order[first % N :][:count]]

def split_batches(run, rows):
    """Micro-batches of rows: an example, n responses (ids), and log q′ (n,) of sampled ones."""
    prompts = [encode_prompt(run.tokenizer, row[0].prompt) for row in rows]
    longest = max(len(y) for row in rows for y in row[1])
    lengths = torch.tensor([*map(len, prompts)])
    tokens = lengths.max() + len(rows[0][1]) * longest * (1 + len(run.tokenizer) / 2**16)
    batches = []
    for part in lengths.argsort(stable=True).split(int(run.cfg.micro_batch_tokens / tokens) or 1):
        examples, responses, *sampled = zip(*[rows[i] for i in part], strict=True)
        batches.append(pack([prompts[i] for i in part], responses, run.device))
        batches[-1].examples = examples
        batches[-1].log_sampled = torch.stack(*sampled) if sampled else None  # (b, n)
    return batches

def log_prob(run, model, batch):
    """log q(y|x) of each response, (b, n), computed in one way for scores, loss and report."""
    with run.autocast():
        return sequence_log_prob(model, batch, run.cfg.temperature)

def judge(run, batch):
    """Sets batch.reward (b, n), the penalty taken off, and batch.figures, what is reported."""
    with run.autocast():
        raw = run.reward(batch)
    if not raw.isfinite().all():
        raise Guard(f"{run.progress}: a reward is not finite")
    ended = torch.isin(batch.branch[..., 1:], batch.branch.new_tensor(run.ends)).any(-1)
    batch.reward = raw - run.cfg.missing_eos_penalty * ~ended
    batch.figures = dict(reward=batch.reward, raw_reward=raw, eos_share=ended,
                         response_tokens=batch.length)

def sample_rollouts(run, proposal, examples, n, *key):
    """3.1 Sample n responses to each example, which has a generator of its own key; as rows."""
    cfg, rows = run.cfg, []
    size = 8 * cfg.micro_batch_tokens // (cfg.max_prompt_tokens + n * cfg.max_response_tokens) or 1
    for first in range(0, len(examples), size):  # more than in training: it keeps no activations
        part = examples[first : first + size]
        prompts = [encode_prompt(run.tokenizer, example.prompt) for example in part]
        generators = [make_generator(cfg.seed, *key, first + i) for i in range(len(part))]
        with run.autocast():
            drawn = sample(proposal, prompts, n, cfg.max_response_tokens, eos_id=run.ends,
                           temperature=cfg.temperature, generator=generators)
        rows += zip(part, *drawn, strict=True)
    return rows

@torch.no_grad()
def score_rollouts(run, prior, proposal, rows, step_size):
    """3.2 Score samples, for each step in its micro-batches, so log q_θ − log q′ begins at 0."""
    steps = [split_batches(run, rows[i : i + step_size]) for i in range(0, len(rows), step_size)]
    for batch in itertools.chain(*steps):
        judge(run, batch)
        batch.log_prior = log_prob(run, prior, batch) if prior else None
        if batch.log_sampled is None:  # given answers, or all of Y, have no proposal
            continue
        batch.log_proposal = log_prob(run, proposal, batch)
        batch.figures["kl_to_prior"] = batch.log_proposal - batch.log_prior  # q′'s; 3.3 puts q_θ's

        gap, length = batch.log_sampled - batch.log_proposal, batch.length  # (b, n)
        same = gap.abs() <= 2e-3 / 53 * length.clamp(min=53)  # measured: 1.8e-4 nats in 53 tokens
        if run.dtype is torch.bfloat16:  # rounding has mean 0 and a small spread
            unbiased = gap.sum().abs() / length.sum() <= 0.01 + 0.1 / length.sum().sqrt()
            small = (gap.square() / length).mean() <= 0.15**2  # measured: 0.012² on an H200
            same = unbiased & small  # of the batch
        if not same.all():
            raise Guard(f"{run.progress}: scored is not sampled, by {gap.abs().max():.2g} nats")
    return steps

def sft_loss(run, model, batch):
    """−log p(reference|x) per token, at temperature 1, (b, 1)."""
    return -sequence_log_prob(model, batch) / batch.length, {}

def preference_loss(run, model, batch):
    """−log P(chosen ≻ rejected), (b,), and the share of pairs ordered right."""
    chosen, rejected = score_reward(model, batch).T  # (b,) each
    return bradley_terry_loss(chosen, rejected), {"accuracy": chosen > rejected}

def policy_loss(run, policy, batch):
    """3.3 Weigh the samples: BRAIn's loss, (b,), and what to watch (README, "Metrics")."""
    cfg, log_policy = run.cfg, log_prob(run, policy, batch)  # (b, n), as all of these
    loss, (alpha, beta) = brain_loss(
        log_policy, batch.log_prior, batch.log_proposal, batch.reward, cfg.kl_coef,
        target=cfg.target, baseline=cfg.baseline, divergence=cfg.divergence)
    return loss, batch.figures | {
        "ess_alpha": effective_sample_size(alpha), "ess_beta": effective_sample_size(beta),
        "reward_spread": batch.reward.std(-1) / cfg.kl_coef,
        "kl_to_prior": (beta * (log_policy.detach() - batch.log_prior)).sum(-1),  # q_θ's, by SNIS
        "refresh_kl_sd": batch.figures["kl_to_prior"].std(-1)}  # log q′/p: rounding, at first

def accumulate_gradient(run, model, batches, loss_of):
    """Add up the gradient, if there is one, of the mean loss; returns means of loss and metrics."""
    found, total = [], sum(len(batch.examples) for batch in batches)
    for batch in batches:
        with run.autocast():
            loss, metrics = loss_of(run, model, batch)  # (b,) or (b, n), meaned over all
        if loss.requires_grad:
            (loss.sum() / total).backward()
        found.append({"loss": loss.detach(), **metrics})
    return {key: torch.cat([one[key] for one in found]).double().mean().item() for key in found[0]}

class Stage:
    """A stage of training, from where the last state left it; once a period it shows a line."""

    def __init__(self, run, name, model, steps, lr, period):
        self.run, self.name, self.model = run, name, model.requires_grad_()
        self.steps, self.lr, self.period = steps, lr, period
        self.optimizer = torch.optim.Adam(model.parameters(), eps=1e-5)
        self.start = run.state.pop("step", 0)  # the state's, for this process's first stage, else 0
        if self.start:
            model.load_state_dict(run.state.pop("model"))  # its memory is free again
            self.optimizer.load_state_dict(run.state.pop("optimizer"))

    def __iter__(self):
        """The steps that are left, with a bar on a terminal."""
        self.began = time.time()
        for step in tqdm(range(self.start, self.steps), self.name, disable=None):
            self.step, self.run.progress = step, f"{self.name}, step {step}"
            yield step

    def update(self, metrics, shown):
        """3.4 Step: Adam at a rate that falls linearly to 0. When due, shows a sample and saves."""
        run, period, done = self.run, self.period, self.step + 1
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.cfg.max_grad_norm)
        if not math.isfinite(metrics["loss"] + norm):
            raise Guard(f"{run.progress}: loss or gradient is not finite; the last state is kept")
        self.optimizer.param_groups[0]["lr"] = rate = self.lr * (1 - self.step / self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

        spent = time.time() - self.began
        self.log(step=self.step, **metrics, gradient_norm=norm.item(), learning_rate=rate,
                 seconds_stage=spent, peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        if self.step % period == 0:
            told = ("loss", "accuracy", "reward", "kl_to_prior", "ess_alpha")
            figures = [f"{key} {metrics[key]:.3g}" for key in told if key in metrics]
            x, y = str(shown.examples[0].prompt), run.tokenizer.decode(shown.responses[0][0])
            tqdm.write(f"{run.progress} of {self.steps}: {', '.join(figures)}; {spent:.0f} s; "
                       f"…{x[-40:]!r} → {y[:100]!r}")
        if done == self.steps or done / period % math.ceil(run.cfg.save_every / period) == 0:
            run.save(stage=self.name, step=done, model=self.model.state_dict(),
                     optimizer=self.optimizer.state_dict())

    def log(self, **metrics):
        """A line of metrics.jsonl, which the state repeats."""
        line = json.dumps({"stage": self.name, **metrics}) + "\n"
        self.run.state["metrics"] += line
        with open(self.run.out / "metrics.jsonl", "a") as file:
            file.write(line)

def encode_answers(run, examples, columns, limit):
    """The examples that have answers in all of these columns, each with the answers' ids."""
    n = len(columns)
    found = [x for x in examples if None not in map(partial(getattr, x), columns)]
    ids = [encode_response(run.tokenizer, example.prompt, getattr(example, column), run.ends, limit)
           for example in found for column in columns]
    if cut := sum(y[-1] not in run.ends for y in ids):
        print(f"{', '.join(columns)}: {cut} of {len(ids)} texts are cut to {limit} tokens, no end")
    return [*zip(found, [ids[i : i + n] for i in range(0, len(ids), n)], strict=True)]

def train_on_texts(run, name, model, loss_of, splits, columns, limit, size, epochs, lr):
    """Stage 1 or 2: a loss of given answers, and in the end its figures on held-out ones."""
    train, held_out = (encode_answers(run, examples, columns, limit) for examples in splits)
    stage = Stage(run, name, model, math.ceil(epochs * len(train) / size), lr, run.cfg.save_every)
    for step in stage:
        batches = split_batches(run, take(train, step * size, size, run.cfg.seed, name))
        stage.update(accumulate_gradient(run, model, batches, loss_of), batches[0])
    model.requires_grad_(False)
    if held_out:
        stage.log(held_out=accumulate_gradient(run, model, split_batches(run, held_out), loss_of))

def train_policy(run, prior, policy, examples):
    """Stage 3. At each refresh q′, the policy of then or the prior, samples for `refresh` steps."""
    cfg, size, n = run.cfg, run.cfg.prompts_per_step, run.cfg.samples_per_prompt
    refresh = cfg.prompts_per_refresh // size  # steps from one to the next
    proposal = policy if cfg.proposal == "lagged" else prior  # no copy: log q′ is kept, not q′

    stage = Stage(run, "brain", policy, cfg.steps, cfg.lr, refresh)
    for step in stage:
        if step % refresh == 0:  # a resume begins with one
            drawn = take(examples, step * size, refresh * size, cfg.seed, "brain")
            rows = sample_rollouts(run, proposal, drawn, n, "brain", step)  # 3.1 sample
            rollouts = score_rollouts(run, prior, proposal, rows, size)  # 3.2 score
        batches = rollouts[step % refresh]
        metrics = accumulate_gradient(run, policy, batches, policy_loss)  # 3.3 weigh, and backward
        # 3.4 step
        stage.update(metrics, batches[0])

# ---- Evaluation, and the stages from data to report ---------------------------------------------
def mean_se(values):
    """Mean and standard error, over prompts, of a figure of each response (B, m)."""
    means = values.double().mean(-1)  # (B,)
    return means.mean().item(), means.std().item() / len(means) ** 0.5

@torch.no_grad()
def exact_kl(run, prior, policy, examples):
    """Toy's exact KL of the posterior to the prior (start) and the policy (end), over all of Y."""
    R, V = run.cfg.max_response_tokens, prior.get_input_embeddings().num_embeddings
    if run.cfg.task != "toy" or V**R > 50_000:
        return {}
    space = {until_end(y, run.ends) for y in itertools.product(range(V), repeat=R)}
    rows = [(example, sorted(map(list, space))) for example in examples]
    kls = []
    for batch in score_rollouts(run, prior, None, rows, len(rows))[0]:
        log_q = torch.stack([batch.log_prior, log_prob(run, policy, batch)])  # (2, b, |Y|)
        log_posterior = (batch.log_prior + batch.reward / run.cfg.kl_coef).log_softmax(-1)
        kls.append((log_posterior.exp() * (log_posterior - log_q)).sum(-1))  # (2, b)
    start, end = torch.cat(kls, -1).mean(-1).tolist()
    return dict(kl_to_posterior_start=start, kl_to_posterior_end=end)

def evaluate(run, models, examples):
    """Stage 4: figures, (mean, standard error), of each author, and the rows of samples.jsonl."""
    cfg, B, known = run.cfg, len(examples), {}  # known: the reward of each response so far
    figures, samples, rewards = {}, [], {}
    limit = max(cfg.max_response_tokens, cfg.max_comparison_tokens)
    for author, model in [*models.items(), ("reference", None)]:
        rows = (sample_rollouts(run, model, examples, cfg.eval_samples, "eval", author) if model
                else encode_answers(run, examples, ["reference"], limit))
        if len(rows) < B:  # not all have a reference
            continue
        batches, = score_rollouts(run, models["prior"] if model else None, model, rows, B)
        for batch in batches:
            scored = zip(batch.examples, batch.responses, batch.reward.tolist(), strict=True)
            for example, ys, worth in scored:
                texts = [response_text(run.tokenizer, y, run.ends) for y in ys]
                keys = [repr((example, y)) for y in ys]  # equal responses have equal rewards
                samples.append(dict(prompt=example.prompt, model=author, responses=texts,
                                    rewards=[*map(known.setdefault, keys, worth)]))
        figures[author] = {key: mean_se(torch.cat([batch.figures[key] for batch in batches]))
                           for key in batches[0].figures}
        rewards[author] = torch.tensor([row["rewards"] for row in samples[-B:]], dtype=torch.double)

    for author, other in itertools.combinations(sorted(rewards), 2):  # policy, prior, reference
        gaps = rewards[author][:, :, None] - rewards[other][:, None]  # (B, m, m′); 0 is half
        figures[author][f"win_rate_vs_{other}"] = mean_se((1 + gaps.sign()).flatten(1) / 2)
    return figures, samples

def report(run, result, figures, samples):
    """report.md, samples.jsonl and result.json; report and result are printed, too."""
    usual = asdict(Config(device=run.device)) | TASKS[run.cfg.task].preset
    flags = dict(sorted(run.state["config"].items() - (usual | run.free).items()))
    lines = [f"# BRAIn on {run.cfg.task}\n", f"Flags beside the task's own: `{flags}`\n",
             "Means over held-out prompts ± standard errors; samples.jsonl has the samples:\n",
             f"| | {' | '.join(figures)} |", "|---" * (1 + len(figures)) + "|"]
    for key in figures["policy"]:  # which has all
        row = [f"{x[key][0]:.3f} ± {x[key][1]:.3f}" if key in x else "" for x in figures.values()]
        lines.append(f"| {key} | {' | '.join(row)} |")
    (run.out / "report.md").write_text("\n".join(lines) + "\n", "utf-8")
    (run.out / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in samples))
    (run.out / "result.json").write_text(json.dumps(result | {"config": asdict(run.cfg)}))
    print(*lines, json.dumps(result), sep="\n")

def toy_model(run):
    """A GPT-NeoX that knows nothing yet, and a tokenizer of 10 words."""
    torch.manual_seed(run.cfg.seed)
    ids = {word: i for i, word in enumerate(["<eos>", TLDR.strip(), *KEYS, *FILLERS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # one token a word
    shape = transformers.GPTNeoXConfig(vocab_size=len(ids), hidden_size=64, intermediate_size=256,
                                       num_hidden_layers=2, num_attention_heads=4, eos_token_id=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return ready(run, AutoModelForCausalLM.from_config(shape), tokenizer), tokenizer

def prepare(run):
    """Prior and data, all read and found good before the run's folder has a state."""
    cfg, stage = run.cfg, run.state["stage"]
    source = cfg.prior or (cfg.base if stage == "sft" else f"{run.out}/prior")
    prior, run.tokenizer = load(run, AutoModelForCausalLM, source) if source else toy_model(run)
    ends = prior.generation_config.eos_token_id  # none, one or several
    ends = ends if isinstance(ends, list) else [ends]
    run.ends = sorted({run.tokenizer.eos_token_id, *ends} - {None})
    if cfg.reward or stage == "brain":
        run.reward = load_reward(run, cfg.reward or f"{run.out}/reward", prior)
    elif source:  # stage 2 will need one
        load(run, AutoModelForSequenceClassification, source, num_labels=1)

    train, test = (load_task(cfg, split, run.tokenizer) for split in ("train", "test"))
    for flag, column in ("prior", "reference"), ("reward", "chosen"):
        refuse_if(not getattr(cfg, flag) and all(getattr(row, column) is None for row in train),
                  f"train has no row with a {column} text; add some, or give --{flag}")
    check_texts(run.tokenizer, train[:16] + test[:16])
    with explain("a rehearsal of 3.1 and 3.2, with two prompts"):  # or it fails after hours
        rows = sample_rollouts(run, prior, train[:2], cfg.samples_per_prompt, "rehearsal")
        if run.reward:
            score_rollouts(run, prior, prior, rows, 2)
    size = prior.num_parameters()
    left = f"{shutil.disk_usage(run.out).free / 1e9:.3g} GB of disk"
    if run.device == "cuda":
        left += f" and {torch.cuda.mem_get_info()[0] / 1e9:.3g} GB of memory"
    print(f"{cfg}\nneeded: {36e-9 * size:.2g} GB of disk, {24e-9 * size:.2g} GB of memory and what "
          f"--micro_batch_tokens adds; free: {left}")
    if not (run.out / "state.pt").exists():  # from here on, the folder is this configuration's
        run.save()
    (run.out / "metrics.jsonl").write_text(run.state["metrics"])
    (run.out / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
    return prior, train, test

def execute(run):
    """Stages 1 to 4."""
    cfg, began = run.cfg, time.time()
    prior, train, test = prepare(run)
    held_out = take(test, 0, min(cfg.eval_prompts, len(test)), cfg.seed, "eval")
    if run.state["stage"] == "sft":  # stage 1
        train_on_texts(run, "sft", prior, sft_loss, (train, held_out), ["reference"],
                       cfg.max_response_tokens, cfg.sft_batch, cfg.sft_epochs, cfg.sft_lr)
        run.export(prior, "prior")
    if not run.reward:  # stage 2
        reward, _ = load(run, AutoModelForSequenceClassification, cfg.prior or f"{run.out}/prior",
                         num_labels=1)
        train_on_texts(run, "reward", reward, preference_loss, (train, held_out),
                       ["chosen", "rejected"], cfg.max_comparison_tokens, cfg.reward_batch,
                       cfg.reward_epochs, cfg.reward_lr)
        run.export(reward, "reward")
        run.reward = partial(score_reward, freeze(reward, run.dtype))

    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 heads: 10 bits of mantissa, bf16 has 7
    policy = copy.deepcopy(freeze(prior, run.dtype)).float()  # stage 3: from rounded matrices
    train_policy(run, prior, policy, train)
    run.export(policy, "policy")

    run.progress = "eval"  # stage 4
    figures, samples = evaluate(run, dict(prior=prior, policy=freeze(policy, run.dtype)), held_out)
    result = dict(task=cfg.task, steps=cfg.steps, seconds=time.time() - began,
                  reward_reference=None, win_rate_vs_reference=None, win_rate_vs_reference_se=None)
    result |= {f"reward_{author}": row["reward"][0] for author, row in figures.items()}
    for key, (mean, error) in figures["policy"].items():
        result |= {key: mean, f"{key}_se": error}
    report(run, result | exact_kl(run, prior, policy, held_out[:8]), figures, samples)

def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a failed check, a guard, no memory or no disk; 2: bad input; 130: Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights, and all of the hub's
    utils.logging.set_verbosity_error()  # or each retry is told before the one line
    if hasattr(sys.stdout, "reconfigure"):  # a log is written line by line, in any encoding
        sys.stdout.reconfigure(errors="replace", line_buffering=True)

    try:
        cfg = parse_config(argv)
        if cfg.check:
            checks = derivation_checks()
            for name, claim, error, tolerance, ok in checks:
                print(f"{'ok' if ok else 'FAIL'}  {error:.1e} ≤ {tolerance:.0e}  {name}: {claim}")
            return int(not all(check.ok for check in checks))
        run = Run(cfg)
        with run.lock:
            execute(run)
        return 0
    except SystemExit as stop:  # --help
        return int(stop.code != 0)
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command continues"
    except Exception as error:
        if not (isinstance(error, Stop | OSError) or out_of_memory(error)):
            raise  # a bug
        status, message = 2 if type(error) is Stop else 1, one_line(error)
    print(f"brain.py: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
