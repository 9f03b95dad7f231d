"""What brain.py claims, proved. Each test says in its docstring which mistake it catches.

    1 Derivations     the paper, line by line, on numbers in float64     pytest -k derivation   10 s
    2 Scores          n branches of a prompt are n plain rows; samples follow the softmax
    3 Data            four formats, ends of text, downloads, broken rows
    4 Training        a step by hand, each figure by its definition, a small world that is known
    5 The folder      kill it, fill the disk, start it twice: the same command continues
    6 Bad input       one line that says what is wrong and where
    7 The front page  the commands and snippets of README run
    8 Programs        python test_brain.py bench | compare | capitals: the figures of README

Part 1 needs no model: read it beside `brain_loss`. The others share the tiny models of part 2 and
three ways to run the program: `launch` it here, `fork` it, be `refused` by it.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import brain

# ---- 1 Derivations: float64, each identity on a second path, in exp, log and sums ----------------
# q, p, q1 and r are log q_θ (policy), log p (prior), log q′ (proposal) and the reward, (B, n).
# ρ is q − q1, d is p + r/kl_coef − q, and α̂ and β̂ are the shares of posterior and policy.

KL = 0.7  # kl_coef ≠ 1, so that a product in place of a quotient shows
BASELINES = ("none", "unnormalized", "self_normalized")
DIVERGENCES = ("forward", "reverse", "log_variance")
DIALS = {name: {"baseline": name} for name in BASELINES} | {"argmax": {"target": "argmax"}}
DIALS |= {name: {"divergence": name} for name in DIVERGENCES[1:]}  # the baselines run "forward"
TENSORS = ("log_policy", "log_prior", "log_proposal", "reward")

def draw(*shape, seed=0):
    """Standard normal float64 numbers, the same for one seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def close(got, want, tolerance=1e-12):
    """Equal up to an absolute difference: tensors, or tuples of them."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)

def shares(x):
    """Rows divided by their sum."""
    return x / x.sum(-1, keepdim=True)

def by_autograd(loss, x):
    """loss(x), and the gradient of its sum in x."""
    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

def loss_and_gradient(log_policy, *rest, **dials):
    """brain_loss (B,) and its gradient in log q_θ (B, n)."""
    return by_autograd(lambda q: brain.brain_loss(q, *rest, **dials)[0], log_policy)

@pytest.mark.parametrize("shape", [(1, 2), (4, 3), (2, 64)])
@pytest.mark.parametrize("baseline", BASELINES)
def test_derivation_the_gradient_is_alpha_hat_less_the_baseline(baseline, shape):
    """Σ α̂ (log nα̂ − ρ) + A(ρ) has the gradient −Σ (α̂ − b) ∇log q, b = ∂A/∂ρ. Catches wrong sign
    or size of b, α̂ without prior, proposal or 1/kl_coef, a lost constant, the weights swapped."""
    q, p, q1, r = inputs = draw(4, *shape, seed=2)
    alpha = shares((p + r / KL - q1).exp())
    ratio = (q - q1).exp()
    b, A = {"none": (0 * ratio, 0),
            "unnormalized": (ratio / shape[-1], ratio.mean(-1) - 1),
            "self_normalized": (shares(ratio), ratio.mean(-1).log())}[baseline]

    loss, gradient = loss_and_gradient(*inputs, KL, baseline=baseline)
    close(gradient, b - alpha)
    close(loss, (alpha * (shape[-1] * alpha / ratio).log()).sum(-1) + A)
    for weights in (brain.snis_weights(*inputs, KL), brain.brain_loss(*inputs, KL)[1]):
        close(weights.alpha_hat, alpha)
        close(weights.beta_hat, shares(ratio))

@pytest.mark.parametrize("same", [*TENSORS[1:], "all"])
@pytest.mark.parametrize("name", DIALS)
def test_derivation_only_the_policy_carries_a_gradient(name, same):
    """Catches a gradient through the prior, the proposal or the reward: where the policy's own leaf
    stands there, too, it must add nothing. Catches weights that are returned with a gradient."""
    leaf, *rest = draw(4, 3, 5, seed=3)
    rest = [leaf if same in (at, "all") else x for at, x in zip(TENSORS[1:], rest, strict=True)]
    alone = loss_and_gradient(leaf, *rest, KL, **DIALS[name])[1]
    leaf.requires_grad_()
    loss, weights = brain.brain_loss(leaf, *rest, KL, **DIALS[name])
    close(torch.autograd.grad(loss.sum(), leaf)[0], alone)
    assert not any(weight.requires_grad for weight in weights)

@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_derivation_zero_at_the_optimum_for_every_tuple(divergence, n):
    """Once the policy is the posterior no draw leaves a gradient, whoever sampled it: there is no
    variance to average away. Catches β̂ or ρ that is not built as α̂ is, or d without a term."""
    p, q1, r = 2 * draw(3, 4, seed=9)
    y = torch.tensor(list(itertools.product(range(4), repeat=n)))  # all tuples of four responses
    posterior = (p + r / KL).log_softmax(-1)
    loss, gradient = loss_and_gradient(posterior[y], p[y], q1[y], r[y], KL, divergence=divergence)
    assert loss.abs().max() < 1e-12 and gradient.abs().max() < 1e-12

# The relatives of the loss, a few lines each. What is proved of them here is what `compare` races.

def tensor64(rows):
    """A float64 tensor."""
    return torch.tensor(rows, dtype=torch.float64)

class Samples(NamedTuple):
    """What a loss may use of n responses to each of B prompts, (B, n), in the field's letters:
    log π, log π_ref, log π_old (which sampled), r, and |y| in tokens."""

    log_policy: torch.Tensor
    log_prior: torch.Tensor
    log_proposal: torch.Tensor
    reward: torch.Tensor
    length: torch.Tensor

def family(s, kl_coef, **dials):
    """BRAIn (Pandey et al. 2024), or with its dials DPG, GDC++, KL(β̂ ‖ α̂), the log-variance."""
    return brain.brain_loss(*s[:4], kl_coef, **dials)[0]

def centred_return(s, log_policy, kl_coef):
    """R − mean R, where R = r − kl_coef·log(π/π_ref): the KL is in the reward."""
    R = s.reward - kl_coef * (log_policy - s.log_prior)
    return (R - R.mean(-1, keepdim=True)).detach()

def rloo(s, kl_coef):
    """RLOO (Ahmadian et al. 2024): −1/n Σᵢ (Rᵢ − mean of the other R) log π(yᵢ)."""
    advantage = centred_return(s, s.log_policy, kl_coef)  # (n − 1)/n of Rᵢ − mean of the others
    return -(advantage * s.log_policy).sum(-1) / (s.reward.shape[-1] - 1)

def clipped(s, advantage):
    """−1/n Σᵢ min(ρᵢAᵢ, clip(ρᵢ)Aᵢ), ρ = π/π_old, clip to 1 ± 0.2."""
    ratio = (s.log_policy - s.log_proposal).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean(-1)

def ppo(s, kl_coef):
    """PPO (Schulman et al. 2017), a response being one action and the group's mean the critic."""
    return clipped(s, centred_return(s, s.log_proposal, kl_coef))

def grpo(s, kl_coef):
    """GRPO (Shao et al. 2024) at the level of responses: PPO's A over the s.d. of the group's R. No
    1/|y|, and the KL is in the reward, not in the loss."""
    advantage = centred_return(s, s.log_proposal, kl_coef)
    return clipped(s, advantage / (advantage.std(-1, keepdim=True) + 1e-4))

def best_and_worst(values, reward):
    """The values (B, n) of the responses of highest and of lowest reward, (B,) each."""
    ends = torch.stack([reward.argmax(-1), reward.argmin(-1)], -1)  # one and the same if all tie
    return values.gather(-1, ends).unbind(-1)

def dpo(s, beta):
    """DPO (Rafailov et al. 2023): −log σ(β·Δ log(π/π_ref)), chosen less rejected: on a task's pairs
    (reward 1 and 0), or on two samples of the prior that the reward orders, which is DPO-sft."""
    chosen, rejected = best_and_worst(s.log_policy - s.log_prior, s.reward)
    return -F.logsigmoid(beta * (chosen - rejected))

def slic(s, margin):
    """SLiC-HF (Zhao et al. 2023): max(0, δ − log π(y⁺) + log π(y⁻)) − λ·log π(y⁺), λ = 0.1."""
    better, worse = best_and_worst(s.log_policy, s.reward)
    return (margin - better + worse).clamp(min=0) - 0.1 * better

def rrhf(s, _):
    """RRHF (Yuan et al. 2023): Σ max(0, tᵢ − tⱼ) over rᵢ < rⱼ, t = log π(y)/|y|, − log π(best)."""
    t = s.log_policy / s.length
    gap = (t[:, :, None] - t[:, None]).clamp(min=0)  # (B, n, n)
    wrong = s.reward[:, :, None] < s.reward[:, None]
    return (gap * wrong).sum((1, 2)) - best_and_worst(s.log_policy, s.reward)[0]

def best_of_n(s, _):
    """Fine-tuning on the best of the prior's samples (RAFT, Dong et al. 2023): −log π(best)."""
    return -best_and_worst(s.log_policy, s.reward)[0]

def slopes(loss, s, strength, **dials):
    """The value (B,) of a loss of Samples, and its gradient in log π (B, n)."""
    return by_autograd(lambda x: loss(s._replace(log_policy=x), strength, **dials), s.log_policy)

SD = math.sqrt(3) + 1e-4  # of R = −1, 2, 2, divisor n − 1
SIGMOID = 1 / (1 + math.exp(-4))

@pytest.mark.parametrize("loss, reward, value, slope", [
    # R = r − 2 log(π/π_ref) = −1, 0, 6; less the others' mean: −4, −5/2, 13/2
    (rloo, [1, 0, 2], (-4 - 2.5 * 2 + 6.5 * 4) / 3, [4 / 3, 2.5 / 3, -6.5 / 3]),
    # R = r − 2 log(π_old/π_ref) = −1, 2, 2: A = −2, 1, 1; ρ = 1, e, e⁻², the second is clipped
    (ppo, [1, 0, 2], (2 - 1.2 - math.exp(-2)) / 3, [2 / 3, 0, -math.exp(-2) / 3]),
    (ppo, [4, -3, -1], (math.e + 0.8 - 2) / 3, [-2 / 3, math.e / 3, 0]),  # A = 2, −1, −1
    (grpo, [1, 0, 2], (0.8 - math.exp(-2)) / 3 / SD, [2 / 3 / SD, 0, -math.exp(-2) / 3 / SD]),
    (grpo, [2, -2, 0], 0, [0, 0, 0]),  # all R tie
    # the third is chosen, the second rejected: Δ log(π/π_ref) = −2 − 0
    (dpo, [1, 0, 2], math.log(1 + math.exp(4)), [0, 2 * SIGMOID, -2 * SIGMOID]),
    (dpo, [1, 1, 1], math.log(2), [0, 0, 0]),
    (slic, [1, 0, 2], 2 + 4 - 2 + 0.4, [0, 1, -1.1]),
    (slic, [2, 1, 0], 0.1, [-0.1, 0, 0]),  # beyond the margin
    # t = −1, −1/2, −2: wrong are the second over the first, and both over the third
    (rrhf, [1, 0, 2], 0.5 + 1.5 + 1 + 4, [-1 + 1, 0.25 + 0.25, -0.5 - 0.5 - 1]),
    (rrhf, [1, 1, 1], 1, [-1, 0, 0]),
    (best_of_n, [1, 0, 2], 4, [0, 0, -1]),
])
def test_derivation_relatives_by_hand(loss, reward, value, slope):
    """Catches a method that is not its paper's, a hinge that pulls beyond its margin, equal rewards
    that teach, and a clip on the wrong side. kl_coef = β = δ = 2, one prompt, three responses."""
    known = tensor64([[-1, -2, -4], [-2, -2, -2], [-1, -3, -2], [1, 4, 2]])
    policy, prior, proposal, length = known[:, None]
    samples = Samples(policy, prior, proposal, tensor64([reward]), length)
    close(slopes(loss, samples, 2.0), (tensor64([value]), tensor64([slope])))

# Extremes, invariances, dtypes.

EXTREMES = {  # factors of the four tensors, and kl_coef
    "plain": (1, 1, 1, 1, KL),
    "equal rewards": (1, 1, 1, 0, KL),
    "sharp": (1, 1, 1, 1, 1e-3),
    "flat": (1, 1, 1, 1, 1e3),
    "wide policy": (1e4, 1, 0, 1, KL),
    "wide proposal": (1, 1, 1e4, 1, KL),
    "all wide": (1e4, 1e4, 1e4, 1e4, KL),
}

@pytest.mark.parametrize("extreme, name", [
    (extreme, name) for extreme in EXTREMES for name in DIALS
    if name != "unnormalized" or "wide" not in extreme])  # its exp(ρ) overflows by nature
def test_derivation_finite_normalised_and_invariant(extreme, name):
    """Catches log 0, 0·log 0, overflow, a softmax over prompts, a weight that depends on its
    sample's place, and a lost constant: but for `none` a loss is positive, and 0 at least."""
    *factors, kl_coef = EXTREMES[extreme]
    inputs = draw(4, 6, 9, seed=13) * tensor64(factors)[:, None, None]
    inputs[3].round_()  # some rewards tie
    order = [4, 7, 0, 8, 2, 6, 1, 5, 3]
    found, moved = (
        (*brain.snis_weights(*x, kl_coef, DIALS[name].get("target", "posterior")),
         *loss_and_gradient(*x, kl_coef, **DIALS[name]))
        for x in (inputs, inputs[..., order]))

    alpha, beta, loss, gradient = found
    assert all(x.isfinite().all() for x in found)
    assert name == "none" or loss.min() > (0.01 if extreme == "plain" else -1e-9)
    for weight in (alpha, beta):
        assert weight.min() >= 0
        close(weight.sum(-1), torch.ones_like(loss))
    want = (alpha[:, order], beta[:, order], loss, gradient[:, order])
    torch.testing.assert_close(moved, want, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize("name, where", [
    (name, where) for name in DIALS for where in range(4)
    if name not in BASELINES[:2] or where in (1, 3)])  # those two do not normalise ρ
def test_derivation_normalising_constants_cancel(name, where):
    """Catches weights that need Z(x): a constant per prompt drops out of each of the tensors."""
    inputs = draw(4, 3, 5, seed=15)
    before = loss_and_gradient(*inputs, KL, **DIALS[name])
    inputs[where] += tensor64([[2], [-3], [7]])
    close(loss_and_gradient(*inputs, KL, **DIALS[name]), before)

@pytest.mark.parametrize("kl_coef", [1e-3, KL, 1e3])
def test_derivation_ties_share_the_argmax(kl_coef):
    """Catches ties that go to the first sample alone, an argmax of something else than the reward,
    and one that feels kl_coef; the loss sinks to 0 as the policy sharpens on the best."""
    q, p, q1, _ = draw(4, 2, 4, seed=16)
    r = tensor64([[1, 3, 3, 0], [2, 2, 2, 2]])
    want = tensor64([[0, 1 / 2, 1 / 2, 0], [1 / 4] * 4])
    close(brain.snis_weights(q, p, q1, r, kl_coef, "argmax").alpha_hat, want)
    sharp = q1 + 30 * (want > 0)  # exp(−30) is about 1e-13
    close(brain.brain_loss(sharp, p, q1, r, kl_coef, target="argmax")[0], tensor64([0, 0]))

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DIALS)
def test_derivation_loss_keeps_dtype_and_inputs(name, dtype):
    """Catches a stray cast, a constant of the default dtype, an in-place edit of the caller's
    tensors, lost digits in the dtype that trainers use, and dials that return other weights."""
    exact = draw(4, 2, 6, seed=5)
    inputs = exact.to(dtype, copy=True)
    loss, weights = brain.brain_loss(*inputs, KL, **DIALS[name])
    assert (loss.dtype, loss.shape) == (dtype, (2,))
    close(weights, brain.snis_weights(*inputs, KL, DIALS[name].get("target", "posterior")))
    assert weights.alpha_hat.dtype == weights.beta_hat.dtype == dtype
    assert torch.equal(inputs, exact.to(dtype))
    close(loss.double(), brain.brain_loss(*exact, KL, **DIALS[name])[0], 1e-5)

# DPO, InfoNCA, and the policy gradients.

@pytest.mark.parametrize("kl_coef", [1e-3, 50.0])
@pytest.mark.parametrize("beta", [1.0, 0.1, 2.5])
def test_derivation_dpo(beta, kl_coef):
    """With argmax, n = 2 and proposal = prior the loss is DPO's, −log σ(β Δ log(q/p)): on pairs
    that the reward orders (DPO-sft), and on pairs labelled 1 and 0. Catches any other value or
    slope, and a kl_coef that is felt."""
    q, p, r = draw(3, 40, 2, seed=20)
    r[:20] = tensor64([1, 0])
    sign = (r - r.flip(-1)).sign()  # +1 chosen, −1 rejected
    margin = beta * (sign * (q - p)).sum(-1, keepdim=True)

    def ours(q):  # DPO's β is not kl_coef: log p + β log(q/p) stands for log q
        return brain.brain_loss(p + beta * (q - p), p, p, r, kl_coef, target="argmax")[0]

    value = (1 + (-margin[:, 0]).exp()).log()
    slope = -beta * sign / (1 + margin.exp())
    close(by_autograd(ours, q), (value, slope))
    close(slopes(dpo, Samples(q, p, p, r, r), beta), (value, slope))

@pytest.mark.parametrize("n", [2, 5, 32])
def test_derivation_infonca(n):
    """InfoNCA (Chen et al. 2024) at its β = 1 and temperature α = kl_coef, proposal = prior:
    −Σ softmax(r/kl_coef) log softmax(log q/p). Catches a prior that does not cancel in α̂, and a
    loss that differs by more than the target's entropy."""
    q, p, r = draw(3, 10, n, seed=21)
    target, score = shares((r / KL).exp()), shares((q - p).exp())
    loss = (target * target.log() - target * score.log()).sum(-1)
    close(loss_and_gradient(q, p, p, r, KL), (loss, score - target))

@pytest.mark.parametrize("kl_coef", [0.1, 0.7, 3.0])
def test_derivation_ppo_has_the_same_objective(kl_coef):
    """Catches reverse with its arguments swapped, or a wrong posterior: for every policy q over Y,
    E_q[r] − kl_coef·KL(q‖p) + kl_coef·KL(q‖posterior) = kl_coef·log Z."""
    q, p, r = draw(3, 200, 6, seed=22)
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    uniform = torch.full_like(q, -math.log(6))  # every response once, all with one q′
    to_posterior = brain.brain_loss(q, p, uniform, r, kl_coef, divergence="reverse")[0]
    objective = (q.exp() * (r - kl_coef * (q - p))).sum(-1)
    close(objective + kl_coef * to_posterior, kl_coef * (p + r / kl_coef).logsumexp(-1))

@pytest.mark.parametrize("n", [2, 3, 16])
def test_derivation_reverse_is_the_regularised_policy_gradient(n):
    """−1/kl_coef Σ β̂ (R − Σ β̂R) ∇log q for any proposal, R = r − kl_coef·log(q/p). Catches a
    baseline that is not the β̂-mean of R, and a proposal that is left out."""
    q, p, q1, r = inputs = draw(4, 10, n, seed=23)
    alpha, beta = shares((p + r / KL - q1).exp()), shares((q - q1).exp())
    R = r - KL * (q - p)
    loss, gradient = loss_and_gradient(*inputs, KL, divergence="reverse")
    close(gradient, -beta * (R - (beta * R).sum(-1, keepdim=True)) / KL)
    close(loss, (beta * (beta / alpha).log()).sum(-1))

@pytest.mark.parametrize("n", [2, 3, 16])
def test_derivation_reverse_on_policy_is_rloo_ppo_and_grpo(n):
    """Catches a wrong factor between the relatives: on-policy, kl_coef times reverse is PPO's first
    inner step (ratio 1, clip idle), that over the s.d. of R is GRPO's, times n/(n − 1) RLOO's."""
    q, p, r = draw(3, 4, n, seed=24)
    samples = Samples(q, p, q, r, torch.ones_like(r))
    gradient = KL * slopes(family, samples, KL, divergence="reverse")[1]
    close(slopes(ppo, samples, KL)[1], gradient)
    sd = (r - KL * (q - p)).std(-1, keepdim=True) + 1e-4  # of R
    close(slopes(grpo, samples, KL)[1], gradient / sd)
    close(slopes(rloo, samples, KL)[1], gradient * n / (n - 1))

def by_differences(f, x, step=1e-4):
    """The gradient of f in the last axis of x, by central differences."""
    steps = step * torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.stack([(f(x + e) - f(x - e)) / (2 * step) for e in steps], -1)

@pytest.mark.parametrize("n", [2, 3, 16])
def test_derivation_log_variance_is_rloo_whoever_sampled(n):
    """½ Var of d = log p + r/kl_coef − log q. Catches a divisor n, a lost ½, a term or sign of d,
    and a proposal that is felt: the gradient is RLOO's over kl_coef, and that of differences."""
    q, p, q1, r = inputs = draw(4, 10, n, seed=25)

    def by_pairs(q):
        d = p + r / KL - q
        gaps = d[:, :, None] - d[:, None]
        return gaps.square().sum((1, 2)) / (4 * n * (n - 1))

    loss, gradient = loss_and_gradient(*inputs, KL, divergence="log_variance")
    close(loss, by_pairs(q))
    close(gradient, by_differences(by_pairs, q), 1e-9)
    close(gradient, slopes(rloo, Samples(*inputs, torch.ones_like(r)), KL)[1] / KL)
    close(loss_and_gradient(q, p, 3 * q1, r, KL, divergence="log_variance")[1], gradient)

@pytest.mark.parametrize("n, order", [(2, 2), (3, 1), (8, 1)])
def test_derivation_forward_meets_reverse_for_small_advantages(n, order):
    """Catches a forward gradient that is no policy gradient to first order: on-policy, half the
    advantages halve the relative difference (quarter it at n = 2, where α̂ − ½ is odd)."""
    q, p, advantage = draw(3, 1, n, seed=26)
    gaps = []
    for epsilon in (2e-3, 1e-3):
        r = epsilon * advantage + KL * (q - p)  # R = ε·advantage
        forward = loss_and_gradient(q, p, q, r, KL)[1]
        reverse = loss_and_gradient(q, p, q, r, KL, divergence="reverse")[1]
        gaps.append(((forward - reverse).norm() / reverse.norm()).item())
    assert gaps[0] < 1e-2 and gaps[0] / gaps[1] == pytest.approx(2**order, rel=1e-2)

# The whole space, and the expectation over samples (Theorem 4.2).

@pytest.mark.parametrize("baseline", BASELINES)
def test_derivation_enumeration_is_the_true_kl(baseline):
    """Catches a wrong constant (log n, the −1): over all of Y once each the loss is
    KL(posterior ‖ policy), with every baseline, and so is its gradient in the logits."""
    logits, prior, r = draw(3, 5, 7, seed=27)
    posterior, policy = shares((prior + r / KL).exp()), shares(logits.exp())
    known = (prior, torch.full_like(prior, -math.log(7)), r, KL)

    def over_all(logits):
        return brain.brain_loss(logits.log_softmax(-1), *known, baseline=baseline)[0]

    kl = (posterior * (posterior / policy).log()).sum(-1)
    close(by_autograd(over_all, logits), (kl, policy - posterior))

class Enumerated:
    """A response space Y that is small enough to know: tables of |Y| numbers."""

    def __init__(self, size, seed):
        self.logits, prior, proposal, self.reward = draw(4, size, seed=seed)  # the policy's
        self.policy = shares(self.logits.exp())
        self.prior, self.proposal = shares(prior.exp()), shares(proposal.exp())
        self.posterior = shares(self.prior * (self.reward / KL).exp())

    def tuples(self, n):
        """All |Y|ⁿ tuples of responses (tuples, n) and their probability under the proposal."""
        y = torch.tensor(list(itertools.product(range(len(self.policy)), repeat=n)))
        return y, self.proposal[y].prod(-1)

    def expectation(self, n, **dials):
        """The mean of brain_loss over all tuples, and its gradient in the policy's logits."""
        y, probability = self.tuples(n)
        known = (self.prior.log()[y], self.proposal.log()[y], self.reward[y], KL)

        def mean(logits):
            return probability @ brain.brain_loss(logits.log_softmax(-1)[y], *known, **dials)[0]

        return by_autograd(mean, self.logits)

    def divergence(self, n, logits):
        """D_n = E KL(α̂ ‖ β̂) over n samples of the proposal, from tables, without brain_loss."""
        y, probability = self.tuples(n)
        alpha = shares((self.posterior / self.proposal)[y])
        beta = shares((shares(logits.exp()) / self.proposal)[y])
        return probability @ (alpha * (alpha / beta).log()).sum(-1)

    def integral(self, n):
        """The gradient of D_n in the logits, with neither tuples nor softmax: −n q′_y ∫₀^∞ [a_y
        e^(−t a_y) M_a(t)^(n−1) − w_y e^(−t w_y) M_w(t)^(n−1)] dt, M_v(t) = Σ q′ e^(−tv), a =
        posterior/q′, w = policy/q′; by the trapezoid rule in log t."""
        t = torch.arange(-30, 20, 0.25, dtype=torch.float64).exp()
        parts = []
        for v in (self.posterior / self.proposal, self.policy / self.proposal):
            decay = (-t[:, None] * v).exp()  # (t, |Y|)
            others = (decay @ self.proposal) ** (n - 1)
            parts.append((0.25 * t * others) @ (v * decay))
        return -n * self.proposal * (parts[0] - parts[1])

@pytest.mark.parametrize("size, n", [(3, 2), (4, 3), (5, 4), (3, 8)])
def test_derivation_estimator_is_unbiased_for_the_finite_n_divergence(size, n):
    """Catches an estimator that is not the gradient of D_n (Theorem 4.2): its exact expectation
    over all tuples against central differences, and against an integral."""
    space = Enumerated(size, seed=28)
    loss, gradient = space.expectation(n)
    close(loss, space.divergence(n, space.logits))
    close(gradient, by_differences(lambda x: space.divergence(n, x), space.logits), 1e-7)
    close(gradient, space.integral(n), 1e-10)

@pytest.mark.parametrize("n", [2, 3, 5])
def test_derivation_log_variance_on_policy_is_unbiased_for_the_reverse_kl(n):
    """Catches a divisor that is not n − 1: with samples of the policy the expected gradient of
    log-variance, as RLOO's, is that of KL(policy ‖ posterior) at any n."""
    space = Enumerated(4, seed=29)
    space.proposal = space.policy
    d = (space.policy / space.posterior).log()
    gradient = space.expectation(n, divergence="log_variance")[1]
    close(gradient, space.policy * (d - space.policy @ d))

def test_derivation_finite_n_divergence_is_not_the_true_kl():
    """Computes and prints (pytest -s) what README says: D_n is neither the true KL nor a bound on
    it, and the gap closes like 1/n. Theorems, true whatever brain.py does: the two tests above tie
    its loss to D_n."""
    space = Enumerated(5, seed=50)
    true = space.policy - space.posterior  # the gradient of the true KL
    gaps = {}
    for n in (2, 4, 8, 16, 32, 128, 256, 1024):
        gaps[n] = ((space.integral(n) - true).norm() / true.norm()).item()
    print("\ngradient of D_n less the true KL's:", *(f"n={n} {x:.1%}" for n, x in gaps.items()))
    assert list(gaps.values())[:6] == pytest.approx([.74, .61, .45, .27, .14, .035], abs=0.006)
    assert 256 * gaps[256] == pytest.approx(1024 * gaps[1024], rel=0.05)

    for other, factor in ((space, 0.474), (Enumerated(3, seed=754), 2.19)):  # less, and more
        kl = other.posterior @ (other.posterior / other.policy).log()
        assert other.divergence(2, other.logits) / kl == pytest.approx(factor, abs=0.01)

ESTIMATORS = ("DPG", "GDC++", "none", "unnormalized", "BRAIn")
VARIANCES = {
    0.0: [0.125, 0.555, 0.125, 0.555, 0.173],
    0.5: [0.397, 0.354, 0.179, 0.219, 0.193],
    1.0: [1.574, 1.199, 0.298, 0.173, 0.173],
}

def gaussian_estimates(noise, proposal_mean, policy_mean):
    """The five estimates of −∇KL(posterior ‖ policy) in the policy's mean, from draws (…, n); the
    posterior is N(0, 1), policy and proposal are N(mean, 1)."""
    y = proposal_mean + noise
    n = y.shape[-1]
    q = -(y - policy_mean) ** 2 / 2
    p = -y ** 2 / 2  # of the posterior; the reward is 0
    q1 = -noise ** 2 / 2
    alpha, beta = brain.snis_weights(q, p, q1, 0 * y, KL)
    a = (p - q1).exp() / n  # the authors' DPG is p/(nq′), their GDC++ (p − q)/(nq′), Z being known
    w = (q - q1).exp() / n
    weights = torch.stack([a, a - w, alpha, alpha - w, alpha - beta])
    return (weights * (y - policy_mean)).sum(-1)

def test_derivation_authors_experiment():
    """A million draws of n = 8. Catches weights whose variance or bias is not README's, and prints
    its table (pytest -s): against DPG and GDC++ BRAIn trades a bias for a variance."""
    draws = draw(1_000_000, 8, seed=60).split(20_000)
    means = []
    for mu, variances in VARIANCES.items():
        found = torch.cat([gaussian_estimates(noise, mu, 1.0) for noise in draws], -1)  # (5, draws)
        mean, variance = found.mean(-1), found.var(-1)
        squared = variance + (mean + 1) ** 2  # error: the true mean is −1
        for name, *row in zip(ESTIMATORS, mean, variance, squared, strict=True):
            print(f"N({mu}, 1) {name:<13}", *(f"{x:.3f}" for x in row))
        assert variance.tolist() == pytest.approx(variances, rel=0.05)
        means.append(mean[-1].item())
    assert means == pytest.approx([-0.768, -0.847, -0.768], abs=0.005)

    at_posterior = gaussian_estimates(draws[0], 2.0, 0.0)
    assert at_posterior[-1].abs().max() < 1e-12
    assert at_posterior[2].mean() == pytest.approx(0.86, rel=0.05)

# The loss as code: what it refuses, the small functions, and the checks that brain.py itself runs.

@pytest.mark.parametrize("change, message", [
    ({"target": "max"}, "max"),
    ({"baseline": "mean"}, "mean"),
    ({"divergence": "backward"}, "backward"),
    *(({"kl_coef": value}, "kl_coef") for value in (0.0, -1.0, math.nan)),
    ({"kl_coef": 0.0, "target": "argmax"}, "kl_coef"),
    *(({name: draw(*shape)}, "shape") for name in TENSORS for shape in ((1, 5), (3, 1))),
    *((DIALS[name] | {"divergence": divergence}, divergence)
      for name in ("argmax", "none", "unnormalized") for divergence in DIVERGENCES[1:]),
])
def test_derivation_loss_refuses_bad_input(change, message):
    """Catches a dial's typing error that is taken for a default, a dial that the other divergences
    leave unused, and shapes that broadcast in silence."""
    arguments = dict(zip(TENSORS, draw(4, 3, 5, seed=8), strict=True))
    with pytest.raises(ValueError, match=message):
        brain.brain_loss(**arguments | {"kl_coef": KL} | change)
    if not {"baseline", "divergence"} & {*change}:
        with pytest.raises(ValueError, match=message):
            brain.snis_weights(**arguments | {"kl_coef": KL} | change)

def test_derivation_bradley_terry_loss():
    """Catches chosen and rejected swapped, a missing log, and overflow at rewards far apart."""
    rewards = 3 * draw(50, 2, seed=18)
    chosen, rejected = rewards.T
    close(brain.bradley_terry_loss(chosen, rejected), -shares(rewards.exp())[:, 0].log())
    close(brain.bradley_terry_loss(tensor64([1e4, -1e4]), tensor64([0, 0])), tensor64([0, 1e4]))

def test_derivation_effective_sample_size():
    """Catches a missing square or reciprocal: k equal weights count k, unequal ones fewer."""
    found = brain.effective_sample_size(tensor64([[1 / 4] * 4, [0, 1, 0, 0], [0.6, 0.4, 0, 0]]))
    close(found, tensor64([4, 1, 1 / 0.52]))

def test_derivation_checks_pass(capsys):
    """Catches a built-in check that fails or allows too much, and a `--check` that hides one."""
    checks = brain.derivation_checks()
    assert len({check.name for check in checks}) == len(checks)
    assert brain.main(["--check"]) == 0
    for check, line in zip(checks, capsys.readouterr().out.splitlines(), strict=True):
        assert check.ok and check.claim
        assert 0 <= check.error <= check.tolerance <= 1e-10
        assert line.startswith("ok") and check.name in line

@pytest.mark.parametrize("broken", [*DIALS, "all"])
def test_derivation_checks_notice_a_broken_loss(broken, monkeypatch, capsys):
    """Catches checks that cannot fail, or a dial that none of them turns: brain_loss is made wrong
    by 1e-6 in its first row. Broken for one dial, some check fails and not all; broken for all,
    every check fails; and `--check` says so."""
    exact = brain.brain_loss
    default = {"baseline": "self_normalized"}

    def off(*inputs, **dials):
        loss, weights = exact(*inputs, **dials)
        wrong = broken == "all" or (default | dials) == (default | DIALS[broken])
        return loss * (1 + 1e-6 * wrong * torch.eye(len(loss))[0]), weights

    monkeypatch.setattr(brain, "brain_loss", off)
    oks = [check.ok for check in brain.derivation_checks()]
    assert not all(oks) and any(oks) == (broken != "all")
    assert brain.main(["--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("ok") for line in lines] == oks

def test_derivation_checks_have_a_path_of_their_own(monkeypatch):
    """Catches checks that hold the weights against themselves: α̂ without its prior fails those of
    the three baselines."""
    exact = brain.snis_weights
    monkeypatch.setattr(brain, "snis_weights", lambda q, p, *rest: exact(q, 0 * p, *rest))
    assert sum(not check.ok for check in brain.derivation_checks()) >= 3

# ---- What the other parts need: models, files, processes ----------------------------------------

import argparse
import collections
import contextlib
import copy
import errno
import fcntl
import functools
import gzip
import http.server
import importlib.util
import inspect
import io
import json
import locale
import multiprocessing
import operator
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import huggingface_hub
import safetensors.torch
import tokenizers
import transformers
from torch import Tensor
from tqdm import tqdm

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)  # more cost more than they give on tensors as small as these

# ---- Tiny models, tokenizers and files: what the tests are made of -------------------------------

EOS = "<|endoftext|>"
WORDS = """a bad be best blue can cat day do dog for good he how i in is it me my no not of on one
or red say so sun that the they to up was we what why will yes you . , ? !""".split()
SIZES = {416: "vocab_size", 2: "num_hidden_layers num_key_value_heads", 4: "num_attention_heads",
         32: "hidden_size", 64: "intermediate_size", 640: "max_position_embeddings", 8: "head_dim",
         0: "bos_token_id eos_token_id"}
KINDS = {False: transformers.AutoModelForCausalLM,  # by whether it is a reward model
         True: transformers.AutoModelForSequenceClassification}
SHORT = dict(device="cpu", steps=4, save_every=2, sft_epochs=1, sft_batch=256, reward_epochs=1,
             reward_batch=256, samples_per_prompt=4, prompts_per_step=4, prompts_per_refresh=8,
             max_response_tokens=2, max_comparison_tokens=2, eval_prompts=8, eval_samples=2)

def build_tokenizer(bos=False, texts=None, size=400):
    """Pythia's conventions in small: byte-level BPE, eos is id 0, no pad token. With `bos`, a <s>
    of its own (id 1) is put before every text, as Llama's tokenizer does."""
    level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    usual = [f" {a} {b}\n" for a in WORDS for b in WORDS]
    usual += ["\n\nHuman: \n\nAssistant: SUBREDDIT: r/ TITLE: POST: TL;DR:"] * 9
    special = [EOS, "<s>"][: 1 + bos]
    bpe.train_from_iterator(texts or usual, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=level.alphabet(),
        show_progress=False))

    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A" if bos else "$A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[-1], eos_token=EOS, unk_token=EOS)

def word_tokenizer(words, letters=False):
    """A token for each word or letter; the first one is eos, and stands for what is unknown."""
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if letters:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0])

def build_config(family="gpt_neox", **changes):
    """A config of two layers and 32 dimensions, with the sizes that the family has."""
    kind = transformers.CONFIG_MAPPING[family]
    known = {field.name for field in fields(kind)} | {*kind.attribute_map}
    sizes = {name: size for size, names in SIZES.items() for name in names.split()}
    return kind(**{name: size for name, size in sizes.items() if name in known}
                | dict(pad_token_id=None) | changes)

def build_model(family="gpt_neox", reward=False, seed=0, **changes):
    """A causal LM, or a classifier of one label; each weight is drawn, so that none hides a
    mistake, and large enough to matter."""
    changes |= dict(num_labels=1) if reward else {}
    model = KINDS[reward].from_config(build_config(family, **changes)).eval().float()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 0.3 * noise if weight.ndim > 1 else weight.data.nan_to_num() + 0.1 * noise
    return model

def save_checkpoint(folder, family="gpt_neox", tokenizer=None, **options):
    """A checkpoint of build_model and its tokenizer; returns the folder's name."""
    build_model(family, **options).save_pretrained(folder)
    (tokenizer or build_tokenizer(bos=family == "llama")).save_pretrained(folder)
    return str(folder)

def load_checkpoint(folder, reward=False):
    """The model that lies in a folder, as the library reads it."""
    return KINDS[reward].from_pretrained(folder).eval()

def write_rows(path, rows):
    """Rows as a .jsonl or .jsonl.gz file, its folders made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path

def say(count, seed):
    """A sentence of `count` words, each with its leading space."""
    return "".join(f" {word}" for word in random.Random(repr(seed)).choices(WORDS, k=count))

def draw_ids(length, seed):
    """Random ids without 0, the end of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 416, (length,), generator=generator).tolist()

def plain_score(model, prompt, response, temperature=1.0):
    """log q(response | prompt), of ids, from one plain row, every argument left to the model: the
    oracle of all tests."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p[range(len(response)), response].sum()

def table_of(score, model, prompts, responses, *options):
    """A (B, n) tensor of score(model, prompt, response), one call each."""
    return torch.stack([torch.stack([score(model, x, y, *options) for y in ys])
                        for x, ys in zip(prompts, responses, strict=True)])

# ---- Runs: a stand-in for one, and ways to start one ---------------------------------------------

def no_autocast(enabled=False):
    """In the place of torch.autocast, which does not know the device meta."""
    return contextlib.nullcontext()

def fake_run(**changes):
    """A stand-in for brain.Run on a CPU. A change named like an attribute of Run changes that (as
    reward, a model will do), any other a field of its configuration."""
    run = types.SimpleNamespace(
        device="cpu", dtype=torch.float32, autocast=no_autocast, progress="test",
        tokenizer=None, ends=[0], reward=None, out=None, state={"metrics": ""})
    own = {name: changes.pop(name) for name in [*changes] if name in vars(run)}
    if own.get("dtype") is torch.bfloat16:  # as on a card
        run.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    vars(run).update(own)
    if isinstance(run.reward, torch.nn.Module):
        run.reward = functools.partial(brain.score_reward, run.reward)
    run.cfg = replace(brain.Config(task="jsonl", device=run.device), **changes)
    return run

@contextlib.contextmanager
def recorded(name):
    """While it lasts, calls of brain's function `name` are kept: (arguments, result)."""
    function, calls = getattr(brain, name), []

    @functools.wraps(function)
    def spy(*args, **options):
        result = function(*args, **options)
        calls.append((args, result))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, name, spy)
        yield calls

Ran = collections.namedtuple("Ran", "status stdout stderr")  # a command that has ended

def command(out, **flags):
    """The arguments of a run in a folder: these flags over those of SHORT, less those of None."""
    flags = {**SHORT, **flags, "out": out}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]

def run_main(argv):
    """brain.main of a command line, a string or a list, in this process."""
    argv = shlex.split(argv) if isinstance(argv, str) else [*map(str, argv)]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = brain.main(argv)
    return Ran(status, stdout.getvalue(), stderr.getvalue())

def launch(out, **flags):
    """The figures of the last line of a run in this process, which must go well."""
    ran = run_main(command(out, **flags))
    assert ran.status == 0 and not ran.stderr, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])

def fork(out, before=None, wait=True, **flags):
    """A run in a child of this process, after before(): Ran, or, without waiting, the child's
    number. What it says is in OUT.stdout and OUT.stderr."""
    texts = [Path(f"{out}.{name}") for name in ("stdout", "stderr")]
    if child := os.fork():
        if not wait:
            return child
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ran(status, *(path.read_text() for path in texts))

    try:
        status = 99
        sys.stdout, sys.stderr = (path.open("w", buffering=1) for path in texts)
        if before:
            before()
        status = brain.main(command(out, **flags))
    finally:
        os._exit(status)

def refused(argv, status=2):
    """The one line of a command that must end with this status, and the status."""
    ran = run_main(argv)
    assert ran.status == status and ran.stderr.startswith("brain.py: "), ran
    assert len(ran.stderr.splitlines()) == 1 and "Traceback" not in ran.stderr, ran.stderr
    return ran.stderr, ran.status

def lines_of(out):
    """What a run's metrics.jsonl holds so far, whole lines only."""
    text = Path(out, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

def outcome(out):
    """What two runs of one command have in common: metrics, result and samples, less what is timed
    and named, and the weights' bytes."""
    rows = [*lines_of(out), json.loads(Path(out, "result.json").read_text())]
    rows = [{key: value for key, value in row.items()
             if not key.startswith(("seconds", "peak_", "config"))} for row in rows]
    files = [Path(out, "samples.jsonl"), *sorted(Path(out).glob("*/*.safetensors"))]
    return rows, [(path.parent.name, path.read_bytes()) for path in files[1:]], files[0].read_text()

# ---- 2 Scores and samples: branches are plain rows, samples follow the softmax -------------------

FAMILIES = ["gpt_neox", "gpt2", "llama"]
shared_model = functools.cache(build_model)  # for tests that change nothing in it

def stops():
    """A context that a refusal must end."""
    return pytest.raises(brain.Stop)

def near(got, want, tolerance=1e-4):
    """Equal up to an absolute difference, whatever the dtypes; measured: 2e-5 nats."""
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance)

def make_ids(n):
    """Prompts of 9, 1 and 4 ids with n responses each, of 1 to 7 ids, with two, one or no end."""
    responses = [[draw_ids((3 * i + 2 * b) % 6 + i % 3 // 2, 100 * b + i + 7) + [0] * (2 - i % 3)
                  for i in range(n)] for b in range(3)]
    return [draw_ids(length, length) for length in (9, 1, 4)], responses

def loop_score(model, prompt, response, temperature):
    """log q(response | prompt): a forward pass for each token, nothing cached, nothing padded."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]]), use_cache=False).logits[0, -1]
        total = total + (logits.double() / temperature).log_softmax(-1)[token]
    return total

def plain_reward(model, prompt, response):
    """The library's own head on one row; without a pad id it reads the row's last token."""
    return model(torch.tensor([prompt + response])).logits[0, 0]

SCORES = [(brain.sequence_log_prob, plain_score), (brain.score_reward, plain_reward)]

def assert_same_gradients(model, ours, theirs):
    """A random weighting of two (B, n) tensors has the same gradient in every parameter."""
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((weight * x).sum(), [*model.parameters()],
                                        allow_unused=True, materialize_grads=True)
                    for x in (ours, theirs))
    largest = max(gradient.abs().max().item() for gradient in theirs)
    assert largest > 0.1
    for a, b in zip(ours, theirs, strict=True):
        near(a / largest, b / largest, 2e-5)  # measured: 2e-6

@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("n", [1, 3, 6, 8])  # which divide into rows of 1, 1, 2 and 4 branches
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_plain_rows(family, n, reward):
    """Catches positions that do not restart for a branch, one that sees its neighbour or
    padding, a mean over tokens, an end left out (it may be the id that pads, and stand inside),
    branches mixed up, the temperature of a log-probability, a reward that is not read at the last
    token, and a prompt without its gradient."""
    model, (prompts, responses) = shared_model(family, reward), make_ids(n)
    (score, plain), options = SCORES[reward], [] if reward else [0.7]
    packed = score(model, brain.pack(prompts, responses), *options)
    rows = table_of(plain, model, prompts, responses, *options)
    assert packed.dtype == torch.float32
    near(packed, rows)
    assert_same_gradients(model, packed, rows)
    if n == 1 and not reward:
        near(rows, table_of(loop_score, model, prompts, responses, *options))

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_score_does_not_depend_on_its_company(family):
    """Catches padding, neighbours or branches that leak into a score: each response alone, and
    all among far longer prompts and responses, in reverse order."""
    model, (prompts, responses) = shared_model(family), make_ids(6)
    score = functools.partial(brain.sequence_log_prob, model)
    whole = score(brain.pack(prompts, responses))
    alone = [score(brain.pack([prompts[b]], [[y]])) for b in range(3) for y in responses[b]]
    near(torch.cat(alone).view_as(whole), whole)

    long = [draw_ids(40, i) for i in range(6)]
    turned = [ys[::-1] for ys in responses[::-1]]
    padded = score(brain.pack([*prompts[::-1], draw_ids(60, 60)], [*turned, long]))
    near(padded[:3].flip(0, 1), whole)

def test_pack_lays_out_or_refuses():
    """Catches another layout than the one that is documented, an empty prompt, whose first token
    nothing predicts, and a ragged n."""
    batch = brain.pack([[5, 6, 7], [3, 4]], [[[8, 0], [9]], [[1], []]])
    assert batch.prompt.tolist() == [[5, 6, -1], [3, -1, -1]]
    assert batch.branch[0].tolist() == [[7, 8, 0], [7, 9, -1]]
    assert batch.length.tolist() == [[2, 1], [1, 0]]
    for prompts, responses in ([[]], [[[1, 0]]]), ([[1], [2]], [[[1, 0]], [[1, 0], [2, 0]]]):
        with pytest.raises(ValueError):
            brain.pack(prompts, responses)

@torch.no_grad()
def test_padding_sees_itself():
    """Catches an empty row of attention, for which kernels return NaN or what they like, in the
    prompts, the branches and the sampler."""
    model, (prompts, responses), masks = build_model(), make_ids(4), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: masks.append(options["attention_mask"]), with_kwargs=True)
    brain.sequence_log_prob(model, brain.pack(prompts, responses))
    brain.sample(model, prompts, 4, 3, eos_id=-1)
    assert len(masks) == 2 + 1 + 3  # of prompts and branches; of prompts and each token
    assert all((mask == 0).any(-1).all() and mask.isfinite().all() for mask in masks)

# ---- Families: each is right or refused, never wrong ---------------------------------------------

LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=30,
                factor=4.0, short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 5.0, 7.0])

@pytest.mark.parametrize("family, changes, right", [
    ("gptj", dict(rotary_dim=4), True), ("qwen3", {}, True), ("olmo2", {}, True),
    ("opt", dict(ffn_dim=64, word_embed_proj_dim=32), True), ("falcon", {}, True),
    ("mistral", dict(sliding_window=35), True), ("gemma3_text", dict(sliding_window=16), False),
    ("gpt_neo", dict(attention_types=[[["global", "local"], 1]], window_size=40), False),
    ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=30), False),
    ("bloom", {}, False), ("mamba", {}, False)])
@torch.no_grad()
def test_a_family_is_right_or_refused(family, changes, right):
    """Catches a layout that few families can read, and a start check that lets a type through
    whose windows count columns, whose positions depend on the row's length, which has ALiBi or a
    recurrent state, or that fails with more than a line that names the type."""
    model, P, R = build_model(family, **changes), 23, 12
    refusal = pytest.raises(brain.Stop, match=rf"^{family}[^\n]*$")
    with contextlib.nullcontext() if right else refusal:
        brain.check_model(brain.Config(max_prompt_tokens=P, max_response_tokens=R), model)
    prompts = [draw_ids(P, 3), draw_ids(1, 4), draw_ids(9, 5)]
    if right:
        responses, log_q = brain.sample(model, prompts, 8, R, eos_id=[*range(50)])
        rows = table_of(plain_score, model, prompts, responses)
        near(log_q, rows)
        near(brain.sequence_log_prob(model, brain.pack(prompts, responses)), rows)

@pytest.mark.parametrize("name", ["sequence_log_prob", "score_reward"])
@torch.no_grad()
def test_the_start_check_compares_with_plain_rows(name, monkeypatch):
    """Catches a start check that no number can fail, one that rounding fails, one of other lengths
    than the run's, of a single row of branches, or that grows with n; and a context that is too
    short, which rotary models do not notice."""
    P, R, shapes, judge = 40, 12, [], name == "score_reward"
    model = build_model(reward=judge)  # of references and comparisons, which may be longer
    limits = dict(max_response_tokens=R - judge, max_comparison_tokens=R if judge else 256)
    cfg = brain.Config(max_prompt_tokens=P, **limits)
    for n in (8, 512):
        with recorded("forward") as calls:
            brain.check_model(replace(cfg, samples_per_prompt=n), model)
        shapes.append([[*args[3].shape] for args, _ in calls])
    prompts, branches = shapes[0]
    assert shapes[0] == shapes[1] and prompts[1] == P and branches[1] >= 4 * R
    assert branches[0] > prompts[0]  # rows

    real = vars(brain)[name]
    for gap, outcome in (1e-4, contextlib.nullcontext()), (math.nan, stops()), (5e-3, stops()):
        monkeypatch.setattr(brain, name, lambda *args, gap=gap: real(*args) + gap)
        with outcome:
            brain.check_model(cfg, model)
    monkeypatch.undo()
    model.config.max_position_embeddings = P + R - 1
    with pytest.raises(brain.Stop, match="--max_"):
        brain.check_model(cfg, model)

# ---- The sampler: against a plain one, and against the exact softmax, cell by cell ---------------

STATIC = {  # families, and windows that the longest prompt and its response just fit into
    "gpt_neox": {}, "gpt2": {}, "llama": {}, "qwen2": {}, "mistral": dict(sliding_window=39),
    "gemma2": dict(sliding_window=39, attn_logit_softcapping=5.0, final_logit_softcapping=4.0)}

def plain_sample(model, prompt, n, R, ends, temperature, generator):
    """The same law, a branch at a time, with the library's own cache and nothing padded."""
    found = []
    for row in torch.rand(n, R, generator=generator, dtype=torch.float64):
        cache, ids, y = transformers.DynamicCache(), prompt, []
        while len(y) < R and not {*y} & {*ends}:
            logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
            cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
            ids = [int(torch.searchsorted(cdf, row[len(y)] * cdf[-1], right=True))]
            y += ids
        found.append(y)
    return found

@pytest.mark.parametrize("family", STATIC)
@torch.no_grad()
def test_samples_are_those_of_a_plain_sampler(family):
    """Catches a cache that mixes branches, prompts or steps up, or loses columns outside a window,
    positions or masks that are not the score's, log q′ that is not the score of what was sampled,
    a loop that stops too early or goes on after an end, and an end of several that is not one."""
    model, lengths = build_model(family, **STATIC[family]), set()
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")  # it alone has caps
    prompts = [draw_ids(23, 3), draw_ids(1, 4), draw_ids(9, 5)]

    for n, R, eos, T in (3, 16, 0, 0.7), (4, 9, [*range(200, 280)], 1.5):
        keys = [brain.make_generator(i) for i in (0, 1, 2)]
        ids, log_q = brain.sample(model, prompts, n, R, eos_id=eos, temperature=T, generator=keys)
        ends = [eos] if eos == 0 else eos
        assert ids == [plain_sample(model, x, n, R, ends, T, brain.make_generator(i))
                       for i, x in enumerate(prompts)]
        near(log_q, table_of(plain_score, model, prompts, ids, T))
        lengths |= {len(y) for ys in ids for y in ys}
    assert log_q.dtype == torch.float32 and min(lengths) < 9 and max(lengths) == 16

@pytest.mark.parametrize("family", STATIC)
def test_a_card_draws_the_same(family, monkeypatch):
    """Catches columns that are not filled yet and are seen on a card, which reads all of them, a
    token that it draws twice or not at all, and no graph (on a CPU, by a pretended card); on a
    card, a graph that does not do what it has recorded."""
    model, found, done = build_model(family, **STATIC[family]), [], []
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(2):
        generators = [brain.make_generator(i) for i in (0, 1, 2)]
        found.append(brain.sample(model, [draw_ids(23, 3), draw_ids(1, 4), draw_ids(9, 5)], 3, 16,
                                  eos_id=0, generator=generators))
        monkeypatch.setattr(brain, "repeatable", lambda work: done.append(work()) or work)
        monkeypatch.setattr(Tensor, "is_cpu", False)
        monkeypatch.setattr(Tensor, "is_cuda", True)
    assert found[0][0] == found[1][0] and len(done) == 1
    near(found[0][1], found[1][1])

@pytest.mark.parametrize("waits", [False, True])
def test_a_card_records_what_does_not_wait(waits, monkeypatch):
    """Catches a graph of work that waits for the host, which no graph can hold, one that is
    recorded before the work was done once, and a mode of torch that stays."""
    done = []

    def work():
        done.append("work")
        if waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    @contextlib.contextmanager
    def record(graph):
        done.append("record")
        yield

    replay = types.SimpleNamespace(replay=lambda: done.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replay)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", done.append)
    brain.repeatable(work)()
    again = ["work"] if waits else ["record", "work", "replay"]
    assert done == ["warn", "work", "default", *again]

def assert_counts(drawn, probabilities):
    """Each count is binomial(trials, p): both tails, exact; false alarm 1e-7 over all cells."""
    counts, trials = collections.Counter(drawn), len(drawn)
    assert set(counts) <= set(probabilities)
    k = torch.arange(trials + 1, dtype=torch.float64)
    choose = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    for cell, p in probabilities.items():
        density = (choose + k * math.log(p) + (trials - k) * math.log1p(-p)).exp()
        tails = density[: counts[cell] + 1].sum(), density[counts[cell] :].sum()
        assert min(tails) > 1e-7 / 2 / len(probabilities), (cell, counts[cell], trials * p)

def exact_probabilities(model, prompt, limit):
    """p of each response that can be sampled: ids up to an end, 0, or `limit` ids without it."""
    ids = range(1, model.config.vocab_size)
    space = [(*y, 0) for k in range(limit) for y in itertools.product(ids, repeat=k)]
    space += itertools.product(ids, repeat=limit)
    found = {y: plain_score(model, prompt, list(y), 0.8).exp().item() for y in space}
    assert abs(sum(found.values()) - 1) < 1e-5
    return found

@torch.no_grad()
def test_sampler_draws_from_the_exact_distribution():
    """Catches a wrong temperature, truncation, ids after an end, a lost end, steps that are not
    independent, and uniforms that branches or prompts share: all 85 responses of up to three of
    five ids, and pairs of first ids, of two branches and of two prompts."""
    model, prompts = build_model(vocab_size=5, seed=3), [[1, 2, 3, 4], [2]]
    responses, _ = brain.sample(model, prompts * 128, 32, 3, eos_id=0, temperature=0.8,
                                generator=torch.Generator().manual_seed(0))
    drawn = [[tuple(y) for ys in responses[b::2] for y in ys] for b in (0, 1)]
    for ys, prompt in zip(drawn, prompts, strict=True):
        assert_counts(ys, exact_probabilities(model, prompt, 3))

    one, two = (exact_probabilities(model, prompt, 1) for prompt in prompts)
    for left, right, p in ((drawn[0][::2], drawn[0][1::2], one), (*drawn, two)):
        product = {(*a, *b): one[a] * p[b] for a in one for b in p}
        assert_counts([(a[0], b[0]) for a, b in zip(left, right, strict=True)], product)

@torch.no_grad()
def test_sampler_reaches_beyond_the_first_fifty():
    """Catches top-k 50: ids of rank over 50 of 416 come as often as the softmax says."""
    model, prompt = shared_model("gpt_neox"), draw_ids(4, 4)
    p = (model(torch.tensor([prompt])).logits[0, -1].double() / 3).softmax(-1)
    rare = p.argsort()[:-50].tolist()
    share = p[rare].sum().item()
    responses, _ = brain.sample(model, [prompt] * 64, 32, 1, eos_id=0, temperature=3.0,
                                generator=torch.Generator().manual_seed(0))
    drawn = [y[0] in rare for ys in responses for y in ys]
    assert_counts(drawn, {True: share, False: 1 - share})

@torch.no_grad()
def test_samples_of_a_uniform_model_are_the_uniforms_scaled():
    """Catches cumulative probabilities or uniforms in fp32, and a cdf that does not end at 1: over
    200,000 equally likely ids a sample must be ⌊u·V⌋."""
    V, n, R = 200_000, 32, 4
    model = build_model(vocab_size=V)
    model.get_output_embeddings().weight.zero_()
    want = torch.rand(n, R, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * V
    got, log_q = brain.sample(model, [[5, 6, 7]], n, R, eos_id=V,
                              generator=torch.Generator().manual_seed(7))
    assert got == [want.long().tolist()]
    near(log_q / R, torch.full((1, n), -math.log(V)), 2e-6)

@torch.no_grad()
def test_generators_decide_the_samples():
    """Catches a generator that is ignored (the global one differs between the calls) or reset, and
    samples that depend on the other prompts of a batch or on their order."""
    model, (prompts, _) = shared_model("gpt_neox"), make_ids(1)
    sample = functools.partial(brain.sample, model, n=4, max_new_tokens=8, eos_id=0)
    again, drawn = brain.make_generator(5), []
    for generator in (brain.make_generator(5), again, again):
        torch.manual_seed(len(drawn))
        drawn.append(sample(prompts, generator=generator)[0])
    assert drawn[0] == drawn[1] != drawn[2]

    found = collections.defaultdict(set)
    for order in ([0, 1, 2], [1], [2, 0]):
        keys = [brain.make_generator(i) for i in order]
        ids, _ = sample([prompts[i] for i in order], generator=keys)
        for i, ys in zip(order, ids, strict=True):
            found[i].add(str(ys))
    assert [len(each) for each in found.values()] == [1, 1, 1]

# ---- What a card would punish: rounding in bf16, tensors on two devices, waits -------------------

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equal_weights_have_equal_scores_in_bf16(family, tied):
    """Catches a prior whose rounding differs from the policy's, which would put 0.05 to 0.5 nats
    of noise into alpha: all of it in bf16, or its embeddings, norms or head; and matrices that
    stay in fp32, GPT-2's too."""
    run, batch = fake_run(dtype=torch.bfloat16), brain.pack(*make_ids(8))
    score = functools.partial(brain.log_prob, run, batch=batch)
    model = build_model(family, tie_word_embeddings=tied)
    prior = brain.freeze(brain.ready(run, model, build_tokenizer()), run.dtype)
    policy = copy.deepcopy(prior).float()
    assert torch.equal(score(prior), score(policy))
    for name, weight in prior.named_parameters():
        exact = re.search("norm|ln_|emb|wte|wpe|lm_head", name)
        assert weight.dtype is (torch.float32 if exact else run.dtype), name

    if not tied:  # what all of this is for
        prior.base_model.bfloat16()
        assert (score(prior) - score(policy)).std() > 1e-3

@pytest.mark.parametrize("reward", [False, True])
@torch.no_grad()
def test_heads_are_fp32_under_bf16_autocast(reward):
    """Catches a head or a log-softmax in bf16, in scores, samples and rewards. The layers add
    nothing here, so the head alone is there to be rounded."""
    score, plain = SCORES[reward]
    model, (prompts, responses) = build_model(reward=reward), make_ids(4)
    for name, weight in model.named_parameters():
        weight.mul_("dense" not in name)
    exact = table_of(plain, model, prompts, responses)
    batch = brain.pack(prompts, responses)

    with torch.autocast("cpu", torch.bfloat16):
        assert (score(model, batch) - exact).abs().max() > 3e-3  # what this is for
        limits = dict(max_prompt_tokens=8, max_response_tokens=4, max_comparison_tokens=4)
        brain.ready(fake_run(**limits), model, build_tokenizer())
        near(score(model, batch), exact)
        if not reward:
            ids, log_q = brain.sample(model, prompts, 4, 30, eos_id=0)
            near(log_q, table_of(plain, model, prompts, ids), 2e-4)

def test_a_run_begins_in_full_precision(tmp_path):
    """Catches a start check under TF32, and cuDNN's attention left on, whatever ran before."""
    cuda = torch.backends.cuda
    cuda.matmul.allow_tf32 = True
    cuda.enable_cudnn_sdp(True)
    run = brain.Run(brain.parse_config(command(tmp_path / "run")))
    run.lock.lock.release()
    assert not cuda.matmul.allow_tf32 and not cuda.cudnn_sdp_enabled()

def on_one_device(function, one, other, *args):
    """Calls a function that would not refuse tensors of two devices by itself."""
    assert one.device == other.device
    return function(one, other, *args)

@pytest.fixture
def card_waits(monkeypatch):
    """Makes torch's device "meta", whose tensors have no numbers and refuse those of another
    device, pass for a card: a read gives ones. Counts how often the host waits for such a read."""
    waits, real = collections.Counter(), {}
    ones = {"__bool__": lambda x: True, "item": lambda x: 1.0, "__format__": lambda x, form: "1",
            "tolist": lambda x: torch.ones(x.shape, dtype=x.dtype).tolist()}

    def read(name, tensor, *args):
        waits[name] += tensor.is_meta
        return (ones if tensor.is_meta else real)[name](tensor, *args)

    for name in ones:
        real[name] = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, functools.partialmethod(functools.partial(read, name)))
    for owner, name in (torch, "isin"), (torch.nn.functional, "embedding"):
        checked = functools.partial(on_one_device, getattr(owner, name))
        monkeypatch.setattr(owner, name, checked)
    return waits

def test_no_tensor_is_left_on_the_cpu(card_waits):
    """Catches a tensor that is made or kept on the CPU in the start check, in sampling, scoring,
    rewards of both kinds, losses, and the exact KL."""
    policy, judge = (build_model(reward=each, vocab_size=9).to("meta") for each in (False, True))
    tokenizer = word_tokenizer("<eos> a b c d e f g h".split())
    run = fake_run(device="meta", tokenizer=tokenizer, task="toy", reward=judge,
                   max_prompt_tokens=6, max_response_tokens=2)
    for model in (policy, judge):
        brain.check_model(run.cfg, model)
    examples = [brain.Example("a b c"[:k]) for k in (1, 5, 3)]
    rows = brain.sample_rollouts(run, policy, examples, 2)
    (batches,) = brain.score_rollouts(run, policy, policy, rows, 3)
    texts = brain.split_batches(run, [(example, [[1]]) for example in examples])
    pairs = brain.split_batches(run, [(example, [[1, 0], [2]]) for example in examples])
    brain.accumulate_gradient(run, policy, batches, brain.policy_loss)
    brain.accumulate_gradient(run, policy, texts, brain.sft_loss)
    brain.accumulate_gradient(run, judge, pairs, brain.preference_loss)
    assert brain.exact_kl(run, policy, policy, examples)

    run.reward = functools.partial(brain.judge_texts, Path("r.py"), lambda x, y, z: [1] * 6, run)
    brain.judge(run, batches[0])
    assert batches[0].reward.is_meta and batches[0].log_prior.is_meta

@pytest.mark.parametrize("n, R", [(2, 3), (8, 9), (4, 17)])
def test_sampling_hardly_waits_for_a_card(n, R, card_waits):
    """Catches a read of the card at each token, which would leave it idle."""
    brain.sample(build_model().to("meta"), [draw_ids(5, 1), [2]], n, R, eos_id=-1)
    assert 1 <= card_waits.total() <= 1 + R / 8

# ---- Texts and ids: what is judged is what was written -------------------------------------------

PIECES = ["yes", "it", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "ﬁ", "中文", "😀", "12", "a",
         "?", "<b>", "x_y", "\u00a0", " the", "'s"]

def sentence_pieces(kind, *special):
    """A tokenizer of a class of SentencePiece's kind: a mark for a space, one before each text,
    and bytes for what is unknown."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    special = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(
        ["yes it is. no it is not; the sun and 12 moons"],
        tokenizers.trainers.BpeTrainer(show_progress=False, special_tokens=special))
    model = json.loads(bpe.to_str())["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    return getattr(transformers, kind)(vocab=model["vocab"], merges=pairs, add_bos_token=True)

def normalising(normalizer):
    """A byte-level tokenizer that changes texts first."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer

ZOO = {"byte level": build_tokenizer, "BOS": lambda: build_tokenizer(bos=True),
       "NFKC": lambda: normalising(tokenizers.normalizers.NFKC()),
       "Llama": lambda: sentence_pieces("LlamaTokenizer", "<unk>", "<s>", "</s>"),
       "Gemma": lambda: sentence_pieces("GemmaTokenizer", "<pad>", "<eos>", "<bos>", "<unk>")}

@pytest.mark.parametrize("name", ZOO)
def test_texts_read_back_as_they_were_written(name):
    """Catches a response encoded or decoded alone (SentencePiece adds or drops a space), BOS in a
    response, an end that is lost, doubled or put on a text that was cut, and special tokens in a
    text."""
    tokenizer, rng = ZOO[name](), random.Random(0)
    eos, first = tokenizer.eos_token_id, tokenizer("").input_ids
    form = functools.partial(unicodedata.normalize, "NFKC") if name == "NFKC" else str
    for _ in range(100):
        prompt, text = ("".join(rng.choices(PIECES, k=rng.randint(1, 9))) for _ in range(2))
        x = brain.encode_prompt(tokenizer, prompt)
        y = brain.encode_response(tokenizer, prompt, text, [eos], 999)
        assert x == tokenizer(prompt).input_ids
        assert y.index(eos) == len(y) - 1 and not {*y} & {*first}
        assert brain.encode_response(tokenizer, prompt, text, [eos], 2) == y[:2]
        read = brain.response_text(tokenizer, [*first, *y, *x], [eos])
        assert form(read) == form(text), (prompt, text)

    encode = functools.partial(brain.encode_response, tokenizer, "why", ends=[eos], limit=9)
    assert encode("yes") == encode(f"yes{tokenizer.eos_token} it is")
    brain.check_texts(tokenizer, [brain.Example("why is it?\n\nSo:", " yes it is", "it is", " no")])

def test_texts_that_cannot_be_judged_are_refused(tmp_path):
    """Catches a chat without a template, and tokenizers that lose capitals or, under the name of
    another class, most of a text."""
    with stops():
        brain.render(build_tokenizer(), [{"role": "user", "content": "why ?"}])
    path = Path(save_checkpoint(tmp_path), "tokenizer_config.json")
    config = json.loads(path.read_text()) | {"tokenizer_class": "GemmaTokenizer"}
    path.write_text(json.dumps(config))
    wrong = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (wrong, normalising(tokenizers.normalizers.Lowercase())):
        with stops():
            brain.check_texts(tokenizer, [brain.Example("so", "Why is it so?")])

def test_a_model_is_made_ready_or_refused(tmp_path):
    """Catches dropout, gradients or extra outputs left on, a quantisation of null that is taken for
    one, and a model and a tokenizer that do not fit: no eos, a special token behind a prompt, too
    few embeddings, two labels."""
    extra = dict(output_hidden_states=True, output_attentions=True, return_dict=False)
    model = brain.ready(fake_run(), build_model("gpt2", **extra).train(), build_tokenizer())
    assert not any(part.training for part in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert {*model(torch.tensor([[1, 2]]))} == {"logits", "past_key_values"}
    edit(Path(save_checkpoint(tmp_path), "config.json"), quantization_config=None, text_config=None)
    brain.load(fake_run(), transformers.AutoModelForCausalLM, str(tmp_path))

    usual, endless, behind = (build_tokenizer() for _ in range(3))
    endless.eos_token = None
    behind.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 0)])
    two_labels = build_model(reward=True)
    two_labels.config.num_labels = 2
    for model, tokenizer in ((build_model(), endless), (build_model(), behind),
                             (build_model(vocab_size=300), usual), (two_labels, usual)):
        with stops():
            brain.ready(fake_run(), model, tokenizer)

# ---- 3 Data: each format by rules written out here, ends of texts, downloads, broken rows --------

PROMPT = "\n\nHuman: can you say why the cat was up ?\n\nAssistant:"
POST = {"subreddit": "AskDogs", "title": "a dog\n\nPOST: of me", "post": "it ran",
        "summary": "dog ran off"}
TEXTS = {"prompt": PROMPT, "reference": " so be it .", "chosen": " yes .", "rejected": " no ."}
CHAT = {"prompt": [{"role": "user", "content": "why ?", "name": "kim"}], "reference": None,
        "chosen": [{"role": "assistant", "content": "it is so"}], "rejected": "no"}
GOOD_ROWS = {  # task: the file below --data_dir, and good rows of it
    "jsonl": ("train.jsonl", [TEXTS, CHAT]),
    "hh": ("s/train.jsonl.gz", [{"chosen": PROMPT + " a good day .", "rejected": PROMPT + " no"}]),
    "tldr": ("datasets/tldr_3_filtered/train.jsonl", [POST])}

def read(task, folder, tokenizer=None, **changes):
    """load_task of the training split of a folder."""
    cfg = brain.Config(task=task, data_dir=str(folder), **{"hh_subsets": "s", **changes})
    return brain.load_task(cfg, "train", tokenizer or build_tokenizer())

def chat_tokenizer():
    """A tokenizer whose chats are their messages, one after the other."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer

def counts(capsys):
    """The numbers that were printed: rows read, all rows, broken ones, long or empty ones."""
    return [int(number) for number in re.findall(r"\b\d+\b", capsys.readouterr().out)][:4]

def query(row, post):
    """OpenAI's template."""
    return (f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {post}"
            "\n\nTL;DR:")

def cut_as_openai(row, tokenizer, limit):
    """OpenAI's rule, a cut at a time: off goes the last line, or a character where there is one."""
    post = row["post"]
    while post and len(tokenizer(query(row, post)).input_ids) > limit:
        post = post[: post.rfind("\n")] if "\n" in post else post[:-1]
    return query(row, post)

def test_tldr_queries_are_openais(tmp_path, capsys):
    """Catches a wrong template, a trailing space, a post that is cut elsewhere than at its last
    newline that fits, a title that is cut, a summary without its space, and rows not counted."""
    long = [say(20, (i, "line")).strip() for i in range(9)]
    whole = "".join(long)
    posts = ["it ran", "\n".join(long), whole, f"\n{whole}", f"a\n{whole}", f"{whole}\nso",
             "\n\n".join(long[:3]) + " \n\n", "Größe: 3 € – 犬と猫 🐕 " * 9, "🐕" * 50, ""]
    rows = [{**POST, "post": post, "title": f"my dog {i} \nof"} for i, post in enumerate(posts)]
    odd = [{**POST, "summary": " \n"}, {**POST, "title": whole}]  # one is broken, one too long
    write_rows(tmp_path / GOOD_ROWS["tldr"][0], [*rows[:3], *odd, *rows[3:]])
    tokenizer = build_tokenizer()

    examples = read("tldr", tmp_path, tokenizer, max_prompt_tokens=90)
    assert [tuple(example) for example in examples] == [
        (cut_as_openai(row, tokenizer, 90), " dog ran off", None, None) for row in rows]
    assert counts(capsys) == [10, 12, 1, 1]

@pytest.mark.parametrize("glue", ["\n", " "])
def test_long_posts_are_cut_in_near_linear_time(glue):
    """Catches a reader that encodes a post anew for each of its lines or characters."""
    tokenizer, calls = build_tokenizer(), itertools.count()

    def counting(text):
        next(calls)
        return tokenizer(text)

    row = {**POST, "post": glue.join(["it was no day for me ."] * 2000)}
    example = brain.parse_post(row, 512, counting)
    assert next(calls) < 250
    assert 512 - 8 <= len(tokenizer(example.prompt).input_ids) <= 512, "as much as fits"

def test_hh_rows_are_split_at_the_last_turn(tmp_path, capsys):
    """Catches a prompt cut at another turn, a lost leading space, a broken row that is let in or
    ends the run, a long prompt that is cut, and rows not counted."""
    two = PROMPT + " yes" + PROMPT  # turns
    wholes = [(two, " yes ."), (PROMPT, " so be it"), (two, "\nnot me ")]
    broken = [(two + " a", PROMPT + " a"), (two + " a", two), (two + " \n", two + "a"), ("a", "b")]
    long = "\n\nHuman:" + say(99, 1) + two
    pairs = [*broken, *((x + y, x + " bad") for x, y in [*wholes, (long, " no")])]
    rows = [dict(zip(("chosen", "rejected"), pair, strict=True)) for pair in pairs]
    write_rows(tmp_path / "s/train.jsonl.gz", rows[:6])
    write_rows(tmp_path / "t/train.jsonl.gz", rows[6:])

    examples = read("hh", tmp_path, max_prompt_tokens=90, hh_subsets="s t")
    assert [tuple(example) for example in examples] == [(x, y, y, " bad") for x, y in wholes]
    assert counts(capsys) == [3, 8, 4, 1]

def test_the_users_rows_are_read_as_they_stand(tmp_path, capsys):
    """Catches texts that are stripped, a field or a message lost, a byte order mark, CRLF, a blank
    line, a null, a field of the user's own or U+2028 that ends the run, and rows not counted."""
    rows = [TEXTS, {"prompt": " why ?\n", "id": 3}, {"prompt": "a\u2028b", "reference": None}, CHAT,
            {"prompt": say(99, 0)}, {"prompt": "?"}]  # one is too long, one has no tokens
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "train.jsonl").write_bytes("\r\n\r\n".join(lines).encode("utf-8-sig"))
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("?", "")

    examples = read("jsonl", tmp_path, tokenizer, max_prompt_tokens=60)
    assert [tuple(example) for example in examples] == [
        tuple(TEXTS.values()), (" why ?\n", None, None, None), ("a\u2028b", None, None, None),
        (CHAT["prompt"], None, "it is so", "no")]
    assert counts(capsys) == [4, 6, 0, 2]

@pytest.mark.parametrize("bos", [False, True])
def test_given_texts_end_once(bos):
    """Catches BOS twice, missing or in a response, an end that is missing, doubled or put on a
    response that was cut, and a text that goes on after an end inside it."""
    tokenizer = build_tokenizer(bos)
    yes, no = (tokenizer.encode(text, add_special_tokens=False) for text in (" yes .", " no"))
    assert brain.encode_prompt(tokenizer, " yes .") == [1] * bos + yes
    last = no[-1]  # stands for a second end, such as Gemma's <end_of_turn>
    for answer, ends, limit, ids in [
            (" yes .", [0], 9, [*yes, 0]), (" yes .", [0], len(yes), yes), ("", [0], 9, [0]),
            (" yes .", [0], 1, yes[:1]), (f" yes .{EOS}", [0], 9, [*yes, 0]),
            (f" yes .{EOS} no", [0], 9, [*yes, 0]), (" no yes .", [0, last], 9, no)]:
        assert brain.encode_response(tokenizer, " so", answer, ends, limit) == ids, answer

def test_cut_texts_are_counted(capsys):
    """Catches training targets that are cut in silence, and a row without all of its answers."""
    run = fake_run(tokenizer=build_tokenizer())
    rows = [brain.Example("so", " no", " yes", say(9, 0)), brain.Example("so", " no", " yes"),
            brain.Example("so", say(9, 1), say(9, 2), say(9, 3))]
    pairs = brain.encode_answers(run, rows, ["chosen", "rejected"], 5)
    assert [example for example, _ in pairs] == [rows[0], rows[2]]
    assert counts(capsys) == [3, 4, 5], "texts cut, of so many, to so many tokens"
    assert len(brain.encode_answers(run, rows[:2], ["reference"], 5)) == 2
    assert not capsys.readouterr().out, "nothing was cut"

class Files(http.server.SimpleHTTPRequestHandler):
    """Sends a folder's files, or, where its server is `short`, the first 500 bytes of each."""

    def copyfile(self, source, target):
        target.write(source.read(500 if self.server.short else -1))

    def log_message(self, *args):
        pass

@pytest.mark.parametrize("task", ["hh", "tldr"])
def test_absent_files_are_fetched(task, tmp_path, monkeypatch, capsys):
    """Catches a download that is cut short, that adds to what an earlier one left, that lies under
    a temporary name, that is not announced, or that is made again."""
    name, (row,) = GOOD_ROWS[task]
    rows = [{**row, "id": say(9, i)} for i in range(100)]
    theirs, path = write_rows(tmp_path / "theirs" / name, rows), tmp_path / "own" / name
    write_rows(f"{path}.part", rows * 9)  # an earlier run was stopped here
    serve = functools.partial(Files, directory=tmp_path / "theirs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = brain.TASKS[task].read
    found = partial(found.func, *found.args[:2], url)
    monkeypatch.setitem(brain.TASKS, task, brain.TASKS[task]._replace(read=found))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts

    server.short = True
    with pytest.raises(brain.Stop, match=f"{re.escape(str(path))}.*--data_dir.*{url}/{name}"):
        read(task, tmp_path / "own")
    assert not path.exists()
    server.short = False
    examples = read(task, tmp_path / "own")
    assert len(examples) == 100 and path.read_bytes() == theirs.read_bytes()
    assert f"{url}/{name}" in capsys.readouterr().out and [*path.parent.iterdir()] == [path]
    server.shutdown()
    server.server_close()
    assert read(task, tmp_path / "own") == examples, "and not again"

JUNK = [None, False, 0, 1.5, 10**400, float("nan"), "", " ", "\n", "\x00", "\ud800", "\u2028", [],
        {}, [[]], [None], "café 😀", {"text": "x"}, PROMPT, brain.TURN, ["why"],
        [{"role": "user"}], [{"role": "user", "content": "so"}] * 2, [[["role", "user"]]]]

def places(value, path=()):
    """The paths of all values inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))

def mutate(rng, row):
    """A line of a file: a row with something wrong in its structure or in its bytes."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice([0, 1, 1, 2])):  # drop or replace a part of it
        *path, key = rng.choice([*places(row)])
        holder = functools.reduce(lambda part, step: part[step], path, row)
        holder[key] = copy.deepcopy(rng.choice(JUNK))
        if rng.random() < 0.3:
            del holder[key]

    line = json.dumps(row, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 3])):
        at, end = rng.randrange(len(line)), rng.choice([0, 1, 5])
        wrong = rng.choice([b"", b"\xff", b'"', b"}", b"\\u", b"\\ud83d", b"9" * 50, b"["])
        line = line[:at] + wrong + line[at + end :]
    return line

def says(task, row):
    """The Example of a row that was let in."""
    if task == "tldr":
        return query(row, row["post"]), " " + row["summary"].strip(), None, None
    texts = [row.get(key) for key in TEXTS]
    if task == "jsonl":
        return texts[0], *(x[0]["content"] if isinstance(x, list) else x for x in texts[1:])
    at = texts[2].rindex("\n\nAssistant:") + len("\n\nAssistant:")
    assert texts[2][:at] == texts[3][:at] and texts[2][at:].strip() and texts[3][at:].strip()
    return texts[2][:at], texts[2][at:], texts[2][at:], texts[3][at:]

@pytest.mark.parametrize("task, which", [("jsonl", 0), ("jsonl", 1), ("hh", 0), ("tldr", 0)])
def test_mutated_rows_are_told_or_right(task, which, tmp_path):
    """Catches a parser that passes a wrong type or text on, or that ends in another error than
    Stop: 1,500 mutations of good rows, read from files."""
    name, rows = GOOD_ROWS[task]
    rng, tokenizer, path = random.Random(task), chat_tokenizer(), tmp_path / name
    write_rows(path, [])  # makes its folder
    right = told = 0

    for line in [json.dumps(rows[which]).encode(), *(mutate(rng, rows[which]) for _ in range(375))]:
        path.write_bytes(gzip.compress(line, 1) if task == "hh" else line)
        try:
            (example,) = read(task, tmp_path, tokenizer)
        except brain.Stop as error:
            assert path.name in str(error) or " 0 of " in str(error), (line, error)
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, line
            told += 1
        else:
            assert tuple(example) == says(task, json.loads(line)) and str(example[0]).strip(), line
            json.dumps(example, ensure_ascii=False).encode()  # no lone surrogates
            right += 1

    assert min(right, told) > 40, "both sides were tried"

def test_toy_rows_and_the_noise_of_their_judge():
    """Catches splits that share their rows, a seed that changes nothing, a key word left out of a
    prompt, drafts that never or always slip, and a judge that is never or too often wrong."""
    splits = {(seed, split): [*brain.read_toy(brain.Config(seed=seed), split, None)]
              for seed in range(4) for split in ("train", "test")}
    assert [len(rows) for rows in splits.values()] == [2048, 512] * 4
    assert len({tuple(rows[:3]) for rows in splits.values()}) == len(splits), "all differ"
    assert splits[1, "test"] == [*brain.read_toy(brain.Config(seed=1), "test", None)]

    perfect, lost = [], {gap: [] for gap in range(9)}  # lost: whether the better draft did, by gap
    for prompt, *drafts in itertools.chain(*splits.values()):
        *words, end = prompt.split(" ")
        keys = {*words} & {*brain.KEYS}
        assert len(words) == 6 and end == "TL;DR:" and 1 <= len(keys) <= 3
        listed = [draft.split() for draft in drafts]
        reference, chosen, rejected = (2 * len({*y} & keys) - len(y) for y in listed)
        perfect.append(reference == len(keys))
        lost[abs(chosen - rejected)].append(chosen < rejected)
    assert 0.25 < sum(perfect) / len(perfect) < 0.55
    for gap in (1, 2):  # the better one wins with σ(2·gap): 0.12 and 0.02 lose
        share, N = 1 / (1 + math.exp(2 * gap)), len(lost[gap])
        assert sum(lost[gap]) == pytest.approx(share * N, abs=4 * math.sqrt(share * N)) and N > 999

# ---- 4 Training: a step by hand, figures by definition, a known world, whole runs ----------------

def scene(**changes):
    """A run, five examples of unequal lengths, and the ids of their prompts."""
    run = fake_run(tokenizer=build_tokenizer(), temperature=0.6, kl_coef=0.7, max_prompt_tokens=300,
                   max_response_tokens=6, **changes)
    texts = [say(1 + i * (3 + i) % 7, i) for i in range(20)]
    examples = [brain.Example(*texts[i : i + 4]) for i in range(0, 20, 4)]
    return run, examples, [run.tokenizer(example.prompt).input_ids for example in examples]

def assert_step(run, model, batches, loss_of, losses):
    """A step's loss and gradient are the mean of these plain losses, one a prompt; its metrics."""
    assert len(batches) == 1 or len({len(batch.examples) for batch in batches}) == 2
    weights = [*model.parameters()]
    wanted = torch.autograd.grad(losses.mean(), weights)
    found = brain.accumulate_gradient(run, model, batches, loss_of)
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-4, abs=1e-5)

    grad = torch.cat([weight.grad.flatten() for weight in weights])
    want = torch.cat([gradient.flatten() for gradient in wanted])
    assert (grad - want).norm() < 1e-4 * want.norm()
    return found

@pytest.mark.parametrize("tokens", [16384, 50])
@pytest.mark.parametrize("columns", [["reference"], ["chosen", "rejected"]])
def test_steps_of_texts_by_plain_rows(columns, tokens):
    """Catches a supervised loss that is summed, not per token, without its end or at the run's
    temperature; a pair whose sides are swapped, an accuracy of the wrong side; rows of other
    prompts, and a mean over unequal micro-batches that is not one over prompts."""
    run, examples, prompts = scene(micro_batch_tokens=tokens)
    pairs = len(columns) == 2
    model, given = build_model(reward=pairs), brain.encode_answers(run, examples, columns, 12)
    batches = brain.split_batches(run, given)
    ids = [ys for _, ys in given]
    assert {y[-1] for ys in ids for y in ys} == {0}

    score = table_of(plain_reward if pairs else plain_score, model, prompts, ids)
    if not pairs:
        losses = -score[:, 0] / torch.tensor([len(y) for y, in ids])
        assert_step(run, model, batches, brain.sft_loss, losses)
    else:
        losses = (1 + (score[:, 1] - score[:, 0]).exp()).log()
        found = assert_step(run, model, batches, brain.preference_loss, losses)
        right = (losses < math.log(2)).float().mean().item()
        assert found["accuracy"] == pytest.approx(right) and 0 < right < 1

@pytest.mark.parametrize("tokens, dials", [
    (16384, {}), (80, {}), (80, {"target": "argmax"}), (80, {"baseline": "unnormalized"}),
    (80, {"divergence": "reverse"}), (80, {"divergence": "log_variance"})])
def test_steps_of_the_policy_by_plain_rows(tokens, dials):
    """Catches scores of another model or at temperature 1, a penalty that is missing, added, or
    spared where only the prompt holds an end; scores of other prompts once they are sorted, samples
    or losses that depend on micro-batches; a dial that the loss does not see, a metric that is not
    what its name says."""
    judge, *models = [build_model(seed=seed, reward=seed == 0) for seed in range(4)]
    run, examples, prompts = scene(micro_batch_tokens=tokens, reward=judge, missing_eos_penalty=3.0,
                                   **dials)
    run.ends = [0, *(x[-1] for x in prompts), *range(8, 12)]
    prior, proposal, policy = models
    generators = [brain.make_generator(run.cfg.seed, "key", i) for i in range(5)]
    rows = brain.sample_rollouts(run, proposal, examples, 4, "key")
    ids = [ys for _, ys, _ in rows]
    assert ids == brain.sample(proposal, prompts, 4, 6, eos_id=run.ends, temperature=0.6,
                               generator=generators)[0]
    batches, = brain.score_rollouts(run, prior, proposal, rows, 5)

    p, q1, q = (table_of(plain_score, model, prompts, ids, 0.6) for model in models)
    lengths = (torch.tensor([len(y) for ys in ids for y in ys]) + 0.0).view(5, 4)
    ended = torch.tensor([y[-1] in run.ends for ys in ids for y in ys]).view(5, 4).double()
    raw = table_of(plain_reward, judge, prompts, ids).detach()
    reward = raw - 3 * (1 - ended)
    losses, _ = brain.brain_loss(q, p, q1, reward, 0.7, **dials)
    found = assert_step(run, policy, batches, brain.policy_loss, losses)

    worth, beta, moved = (p + reward / 0.7 - q1).exp(), (q - q1).softmax(-1), q1 - p
    if "target" in dials:
        worth = (reward == reward.amax(-1, keepdim=True)).double()
    want = {"loss": losses, "reward": reward, "raw_reward": raw, "eos_share": ended,
            "response_tokens": lengths, "ess_alpha": worth.sum(-1) ** 2 / (worth**2).sum(-1),
            "ess_beta": 1 / (beta**2).sum(-1), "kl_to_prior": (beta * (q - p)).sum(-1),
            "reward_spread": reward.std(-1) / 0.7, "refresh_kl_sd": moved.std(-1)}
    want = {name: values.mean().item() for name, values in want.items()}
    assert found == pytest.approx(want, rel=1e-4, abs=1e-4) and 0 < want["eos_share"] < 1

def test_a_stage_of_texts_by_hand(tmp_path):
    """Catches weight decay, another eps, no clipping, a rate that is constant, ends one step early
    or late or is set after its step, gradients that pile up; a seed or a stage that does not decide
    the order, rows left out though they have the answer, figures of other rows than those that are
    held out; a continued stage that begins anew or forgets its weights or moments."""
    vectors = torch.randn(33, 4, generator=brain.make_generator("hand"))
    vectors *= torch.tensor([3, 1e-5, 1, 0.1])
    rows = [brain.Example(str(i), " yes" if i % 7 else None) for i in range(1, 33)]
    run, saved = fake_run(tokenizer=build_tokenizer(), out=tmp_path, seed=7, max_grad_norm=0.9,
                          save_every=3, micro_batch_tokens=20), {0: {}}
    run.save = lambda stage, step, **parts: saved.update({step: copy.deepcopy(parts)})

    def loss_of(run, model, batch):  # its gradient does not depend on the weights
        return model(vectors[[int(row.prompt) for row in batch.examples]])[:, 0], {}

    def train(start):
        model = torch.nn.Linear(4, 1, bias=False)
        model.weight.data.fill_(9.0)
        run.state = dict(stage="sft", step=start, metrics="", **saved[start])
        splits = rows[:28], rows[28:31]
        brain.train_on_texts(run, "sft", model, loss_of, splits, ("reference",), 9, 6, 2, 0.1)
        return model.weight.detach()

    end, weight, norms = train(0), torch.full((1, 4), 9.0, requires_grad=True), []
    optimizer = torch.optim.AdamW([weight], eps=1e-5, weight_decay=0)
    rates = [0.1 * (8 - step) / 8 for step in range(8)]
    drawn = brain.take([i for i in range(1, 29) if i % 7], 0, 48, 7, "sft")
    for step, rate in enumerate(rates):
        gradient = vectors[drawn[6 * step : 6 * step + 6]].mean(0, keepdim=True)
        norms.append(gradient.norm().item())
        weight.grad = gradient * min(1, 0.9 / norms[-1])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    torch.testing.assert_close(end, weight.detach(), rtol=0, atol=2e-5)
    *lines, last = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [*range(8)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert [line["gradient_norm"] for line in lines] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < 0.9 < max(norms), "some are clipped"
    held_out = (vectors[29:32] @ end.T).mean().item()
    assert last == {"stage": "sft", "held_out": {"loss": pytest.approx(held_out)}}
    assert [*saved] == [0, 3, 6, 8] and torch.equal(train(3), end)

def test_epochs_are_permutations_and_differ():
    """Catches prompts that are skipped or seen twice in an epoch, epochs alike, and a seed or a
    stage that does not change them."""
    items = [*range(10)]
    flat = brain.take(items, 0, 40, 7, "brain")
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == items and epoch != items for epoch in epochs)
    epochs += [brain.take(items, 0, 10, *key) for key in ((8, "brain"), (7, "sft"))]
    assert len(set(map(tuple, epochs))) == 6
    for start, count in itertools.product((0, 4, 10, 25), (1, 6, 9, 15)):  # within, across epochs
        assert brain.take(items, start, count, 7, "brain") == flat[start : start + count]

ONE = torch.zeros(16, 4).index_fill(0, torch.tensor(9), 1.0)  # a prompt's
SIDES = torch.tensor([[1.0, -1.0]]).repeat(16, 2)

@pytest.mark.parametrize("dtype, gap, fine", [
    (torch.float32, 1.8e-3 * ONE, True), (torch.float32, 2.2e-3 * ONE, False),
    (torch.bfloat16, 0.2 * SIDES, True),  # rounding: 0.1 per √token
    (torch.bfloat16, 0.2 * SIDES.abs(), False), (torch.bfloat16, -0.2 * SIDES.abs(), False),
    (torch.bfloat16, 0.4 * SIDES, False)])
def test_scored_is_sampled(dtype, gap, fine, monkeypatch):
    """Catches a guard that tolerates more than rounding: in fp32 2e-3 nats in one response of 4
    tokens, in bf16 small errors that are all to one side, and large ones."""
    run = fake_run(tokenizer=build_tokenizer(), dtype=dtype)
    monkeypatch.setattr(brain, "judge", lambda run, batch: setattr(batch, "figures", {}))
    monkeypatch.setattr(brain, "log_prob", lambda *_: torch.zeros(16, 4))
    rows = [(brain.Example(" why"), [[3, 4, 5, 0]] * 4, gaps) for gaps in gap]
    with contextlib.nullcontext() if fine else pytest.raises(brain.Guard):
        brain.score_rollouts(run, True, None, rows, 16)

# Evaluation: each figure from samples.jsonl alone.

def letters(text, limit=0):
    """Ids of a text of letters, with its end if it is shorter than its limit."""
    ids = [" abcd".index(letter) for letter in text.split()]
    return ids + [0] * (len(ids) < limit)

@pytest.mark.parametrize("tokens", [16384, 24])
def test_figures_of_the_evaluation_by_definition(tokens):
    """Catches a standard error over samples where it is over prompts, figures of another model's
    samples, a KL of the wrong sign, a penalty or an end that is lost, references cut at the limit
    of samples, win rates of the wrong side, ties that do not count half, rounding that breaks the
    tie of equal responses, and rewards that are rounded to fp32, where all of these would tie."""
    calls = itertools.count()

    def reward(batch):  # levels, so that unlike responses tie, and a little more at each call
        length = 1 + (batch.prompt >= 0).sum(-1, keepdim=True)
        total = batch.branch[..., 1:].clamp(min=0).sum(-1)
        return 1e8 + (total + length).double() % 3 + 1e-6 * next(calls)

    run = fake_run(tokenizer=word_tokenizer([EOS, *"abcd"]), reward=reward, temperature=0.6,
                   max_response_tokens=2, max_comparison_tokens=5, missing_eos_penalty=0.25,
                   eval_samples=3, micro_batch_tokens=tokens)
    models = {name: build_model(seed=len(name), vocab_size=5) for name in ("prior", "policy")}
    answers = [" a", " b c d", " a b c d a b", " c d"]  # the third is cut at 5, without an end
    examples = [brain.Example(" ".join("abcd" * 2)[: 2 * i + 1], answers[i % 4]) for i in range(8)]
    figures, samples = brain.evaluate(run, models, examples)
    assert len(samples) == 24 and (next(calls) == 3) == (tokens > 24)

    found, rewards, known = collections.defaultdict(list), collections.defaultdict(dict), {}
    for row in samples:
        author, prompt = row["model"], row["prompt"]
        limit = 5 if author == "reference" else 2
        x, ys = letters(prompt), [letters(text, limit) for text in row["responses"]]
        ended = torch.tensor([float(y[-1] == 0) for y in ys])
        worth = torch.tensor([1e8 + (sum(y) + len(x)) % 3 for y in ys], dtype=torch.float64)
        values = dict(raw_reward=worth, reward=worth - 0.25 * (1 - ended), eos_share=ended,
                      response_tokens=torch.tensor([float(len(y)) for y in ys]))
        if author in models:
            log_q, log_p = (table_of(plain_score, models[name], [x], [ys], 0.6)
                            for name in (author, "prior"))
            values["kl_to_prior"] = log_q - log_p
        for key, numbers in values.items():
            found[author, key].append(numbers.mean().item())

        assert row["rewards"] == pytest.approx(values["reward"].tolist(), abs=1e-4)
        rewards[author][prompt] = row["rewards"]
        for text, number in zip(row["responses"], row["rewards"], strict=True):
            assert known.setdefault((prompt, text), number) == number, "equal responses tie"

    for one, other in ("policy", "prior"), ("policy", "reference"), ("prior", "reference"):
        for row in examples:
            pairs = itertools.product(rewards[one][row.prompt], rewards[other][row.prompt])
            wins = [(x > y) + 0.5 * (x == y) for x, y in pairs]
            found[one, f"win_rate_vs_{other}"].append(statistics.mean(wins))
    assert {(author, key) for author in figures for key in figures[author]} == {*found}
    for (author, key), values in found.items():
        want = statistics.mean(values), statistics.stdev(values) / math.sqrt(8)
        assert figures[author][key] == pytest.approx(want, abs=2e-5), (author, key)
    examples[3] = examples[3]._replace(reference=None)
    assert "reference" not in brain.evaluate(run, models, examples)[0]

# A world small enough to know everything of it: 5 ids, at most 2 in a response, 21 responses.

WORLD = dict(max_prompt_tokens=8, samples_per_prompt=16, prompts_per_step=8, steps=32, lr=2e-3,
             prompts_per_refresh=16, save_every=99, kl_coef=0.2, temperature=0.8, eval_prompts=9)
PROMPTS = [" ".join(some) for size in (1, 2, 3) for some in itertools.combinations("abcd", size)]
SPACE = [[0], *([i, j] for i in range(1, 5) for j in range(5))]

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prior, reward model and 14 rows of the world, for both splits."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), word_tokenizer([EOS, *"abcd"])
    for seed, name in enumerate(("prior", "reward"), 3):
        save_checkpoint(folder / name, tokenizer=tokenizer, reward=name == "reward", seed=seed,
                        vocab_size=5)
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder

def in_world(world, out, **flags):
    """The last line of a run in the world."""
    return launch(out, **{**WORLD, "task": "jsonl", "prior": world / "prior", "data_dir": world,
                          "reward": world / "reward", **flags})

def test_the_policy_moves_to_the_posterior(world, tmp_path, monkeypatch):
    """Catches a loss, a gradient or an update of the wrong sign, weights without the prior or
    without the proposal, KL(policy ‖ posterior) in its place: the exact KL(posterior ‖ policy)
    falls to a third, and what the run told is that, by plain rows."""
    rows = [brain.Example(prompt) for prompt in PROMPTS]
    monkeypatch.setitem(brain.TASKS, "toy", brain.TASKS["toy"]._replace(read=lambda *_: rows))
    with recorded("exact_kl") as calls:
        result = in_world(world, tmp_path, task="toy", missing_eos_penalty=0.5, data_dir=None)
    prompts = [letters(example.prompt) for example in calls[0][0][3]]
    prior, policy, reward = (
        table_of(score, load_checkpoint(folder, score is plain_reward), prompts, [SPACE] * 8, *at)
        .detach().double() for score, folder, *at in (
            (plain_score, world / "prior", 0.8), (plain_score, tmp_path / "policy", 0.8),
            (plain_reward, world / "reward")))

    reward = reward - 0.5 * torch.tensor([y[-1] != 0 for y in SPACE])
    posterior = (prior + reward / 0.2).log_softmax(-1)  # (8, 21), logarithms all
    start, end = ((posterior.exp() * (posterior - log_q)).sum(-1).mean().item()
                  for log_q in (prior, policy))
    assert start > 0.4 and end < start / 3, (start, end)
    told = [result["kl_to_posterior_start"], result["kl_to_posterior_end"]]
    assert told == pytest.approx([start, end], abs=1e-3)

@pytest.mark.parametrize("limit", [1, 3])
def test_only_toy_lists_its_responses(limit, world, tmp_path):
    """Catches the responses of a user's task listed because they are few."""
    result = in_world(world, tmp_path, steps=2, max_response_tokens=limit)
    lines = [result, *lines_of(tmp_path)]
    assert not [key for line in lines for key in line if "posterior" in key]

def test_every_sample_has_a_key_of_its_own(world, tmp_path, monkeypatch):
    """Catches uniforms shared by prompts, by the steps of a refresh, by refreshes, by prior and
    policy in the evaluation, a --seed that does not reach them, and a draw that it does not reach;
    a refresh that is sorted before it is split into steps, which makes some of short prompts alone;
    prompts of the evaluation that are the first ones."""
    real, used = brain.sample, collections.defaultdict(list)

    def sample(*args, generator=None, **options):
        if isinstance(generator, list):
            used[run] += [g.initial_seed() for g in generator]
        return real(*args, generator=generator, **options)

    monkeypatch.setattr(brain, "sample", sample)
    with recorded("policy_loss") as losses:
        for run, seed in enumerate((0, 1, 0)):
            torch.manual_seed(run)  # decides nothing
            in_world(world, tmp_path / f"{run}", steps=4, prompts_per_step=4, seed=seed,
                     prompts_per_refresh=8, samples_per_prompt=4)
    assert outcome(tmp_path / "0") == outcome(tmp_path / "2") and used[0] == used[2]
    assert len({*used[0], *used[1]}) == 2 * (4 * 4 + 2 * 9 + 2)  # of steps, two models, a rehearsal

    drawn = brain.take(PROMPTS, 0, 16, 0, "brain")
    for step, ((_, _, batch), _) in enumerate(losses[:4]):
        prompts = sorted(example.prompt for example in batch.examples)
        assert prompts == sorted(drawn[4 * step : 4 * step + 4])
    rows = map(json.loads, (tmp_path / "0/samples.jsonl").read_text().splitlines())
    prompts = [row["prompt"] for row in rows]
    assert prompts[:9] == prompts[9:] and len({*prompts}) == 9 and {*prompts} != {*PROMPTS[:9]}

# Whole runs: one table, common assertions, then what is special.

LONG = dict(max_prompt_tokens=64, max_response_tokens=5, max_comparison_tokens=8, lr=1e-3)
NEOX = dict(prior="{}/gpt_neox", reward="{}/gpt_neox_reward", **LONG)
RUNS = {
    "toy": dict(task="toy", max_response_tokens=3, max_comparison_tokens=3),
    "chat": dict(task="jsonl", prior="{}/llama", reward="{}/judge.py", data_dir="{}/chat", **LONG),
    "hh": dict(task="hh", base="{}/gpt_neox", data_dir="{}/hh", hh_subsets="b a", sft_lr=2e-2,
               sft_batch=16, reward_batch=16, reward_epochs=6, eval_prompts=16, reward_lr=1e-3,
               divergence="reverse", **LONG),
    "bf16": dict(task="tldr", data_dir="{}/tldr", **NEOX),
    "dropout": dict(task="jsonl", prior="{}/gpt2", reward="{}/gpt2_reward", data_dir="{}/prompts",
                    divergence="log_variance", **LONG),
    "argmax": dict(task="jsonl", data_dir="{}/prompts", proposal="prior", target="argmax", **NEOX)}
RESULT_KEYS = """task steps seconds reward_prior reward_policy reward_reference win_rate_vs_prior
win_rate_vs_prior_se win_rate_vs_reference win_rate_vs_reference_se kl_to_prior kl_to_prior_se
eos_share response_tokens""".split()
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
JUDGE = """
def reward(prompts, responses, references):
    for x, y, z in zip(prompts, responses, references, strict=True):
        assert x[0]["role"] == "user" and z[0] == " " and "<|" not in y, (x, y, z)
    return [len(y) % 5 for y in responses]
"""

def make_dialogue(i):
    """A row of HH: two whole dialogues of one or two turns; the better answer is friendly."""
    turns = [f"\n\nHuman:{say(6 + i % 4, (i, turn))}\n\nAssistant:" for turn in range(1 + i % 2)]
    prompt = say(3, i).join(turns)
    return {"chosen": prompt + say(2 + i % 3, i) + " good day .",
            "rejected": prompt + say(2 + i % 2, -i) + " bad no !"}

def make_checkpoints(root):
    """Models and the FILE.py of RUNS."""
    for family in ("gpt_neox", "gpt2"):
        save_checkpoint(root / family, family, seed=1)
        save_checkpoint(root / f"{family}_reward", family, seed=2, reward=True)
    tokenizer = build_tokenizer(bos=True)
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    save_checkpoint(root / "llama", "llama", seed=1, tokenizer=tokenizer)
    ends = [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    transformers.GenerationConfig(eos_token_id=ends).save_pretrained(root / "llama")
    (root / "judge.py").write_text(JUDGE)

def make_data(root):
    """The files of RUNS: 24 rows to train on and 16 held-out ones."""
    for split, rows in ("train", range(24)), ("test", range(99, 115)):
        write_rows(root / f"prompts/{split}.jsonl", [{"prompt": say(2 + i % 9, i)} for i in rows])
        write_rows(root / f"chat/{split}.jsonl", [
            {"prompt": [{"role": "user", "content": say(3 + i % 5, i)}],
             "reference": [{"role": "assistant", "content": say(3, -i)}]} for i in rows])
        write_rows(root / f"tldr/datasets/tldr_3_filtered/{split}.jsonl", [
            {"subreddit": "dogs", "title": say(2, -i), "post": say(5 + i % 4, i),
             "summary": say(3, i)} for i in rows])
        for subset, first in ("a", 500), ("b", 0):
            write_rows(root / f"hh/{subset}/{split}.jsonl.gz",
                       [make_dialogue(first + i) for i in rows])

class Whole(NamedTuple):
    """A run of the table."""
    out: Path
    status: int
    stdout: str
    stderr: str
    batches: list  # of the steps of stage 3
    tf32: bool  # as it ends

    def lines(self, stage):
        """Its lines of metrics."""
        return [line for line in lines_of(self.out) if line["stage"] == stage]

def as_on_cuda(patch):
    """brain.Run computes as on CUDA: bf16 autocast, the matrices of frozen models in bf16."""
    start = brain.Run.__init__

    def begin(run, cfg):
        start(run, cfg)
        run.dtype = torch.bfloat16
        run.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    patch.setattr(brain.Run, "__init__", begin)

def short_toy(*args):
    """The first of toy's rows."""
    return itertools.islice(brain.read_toy(*args), 256)

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(name): a run of the table, which runs once."""
    root = tmp_path_factory.mktemp("whole")
    make_checkpoints(root)
    make_data(root)

    @functools.cache
    def run(name):
        flags, out = RUNS[name].items(), root / "runs" / name
        flags = {key: x.format(root) if isinstance(x, str) else x for key, x in flags}
        with pytest.MonkeyPatch.context() as patch, recorded("policy_loss") as losses:
            patch.setitem(brain.TASKS, "toy", brain.TASKS["toy"]._replace(read=short_toy))
            if name == "bf16":
                as_on_cuda(patch)
            ran = run_main(command(out, **flags))
        tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        return Whole(out, *ran, [batch for (_, _, batch), _ in losses], tf32)

    return run

@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_tell_what_they_did(name, whole):
    """Catches a run that fails or complains, a figure that is missing, told in two ways, or not
    null where a task has no references; steps left out, a proposal that moves between two refreshes
    or is not refreshed (or dropout, which does the same), ρ ≠ 0 right after a refresh, a refresh
    without its line and sample in a log, and a report that does not say which flags were given."""
    run, flags = whole(name), RUNS[name]
    assert run.status == 0 and not run.stderr, run.stderr  # no bars where nobody looks
    result = json.loads(run.stdout.splitlines()[-1])
    config = json.loads((run.out / "config.json").read_text())
    assert json.loads((run.out / "result.json").read_text()) == result | {"config": config}
    assert {*RESULT_KEYS} <= {*result} and ("kl_to_posterior_end" in result) == (name == "toy")
    bare = flags.get("data_dir") == "{}/prompts"  # without references
    nulls = {key for key, value in result.items() if value is None}
    assert nulls == {key for key in result if bare and "reference" in key}
    assert (result["task"], result["steps"]) == (flags["task"], 4)
    assert all(config[key] == value for key, value in flags.items() if "{" not in str(value))

    lines, argmax = run.lines("brain"), name == "argmax"
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    fresh = [line["step"] for line in lines if line["ess_beta"] == 4]  # ρ = 0: each share is 1/4
    assert fresh == ([0] if argmax else [0, 2])
    still = [line["step"] for line in lines if line["refresh_kl_sd"] == 0]
    assert still == ([0, 1, 2, 3] if argmax else [0, 1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.out / "policy")
    for step in (0, 2):
        told = re.search(rf"^brain\W+step {step}\b.*", run.stdout, re.M)[0]
        batch = run.batches[step]
        x, y = str(batch.examples[0].prompt), tokenizer.decode(batch.responses[0][0])
        figures = [f"{lines[step][key]:.3g}" for key in ("reward", "kl_to_prior", "ess_alpha")]
        for text in (repr(x[-9:])[1:], repr(y[:9])[1:-1], *figures):
            assert text in told, (text, told)

    report = (run.out / "report.md").read_text()
    usual = asdict(brain.Config(device=config["device"]))
    usual |= brain.TASKS[flags["task"]].preset
    told = {key: config[key] for key in sorted(config.keys() - brain.Run.free.keys())
            if config[key] != usual[key]}
    assert f"`{told}`" in report
    authors = ["prior", "policy", "reference"][: 3 - bare]
    rewards = [f"{result[f'reward_{author}']:.3f}" for author in authors]
    assert re.findall(r"(\S+) ±", re.search(r"^\| reward .*", report, re.M)[0]) == rewards
    samples = map(json.loads, (run.out / "samples.jsonl").read_text().splitlines())
    many = collections.Counter((row["model"], len(row["responses"])) for row in samples)
    assert many == {(author, 1 + (author != "reference")): config["eval_prompts"]
                    for author in authors}

def test_a_chat_policy_stops_at_each_of_its_ends(whole):
    """Catches an end of the base's that the exported policy does not know, and a chat template or a
    padding token that is lost."""
    out = whole("chat").out
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "policy")
    model = load_checkpoint(out / "policy")
    ids = tokenizer([" the", " a cat"], padding=True, padding_side="left", return_tensors="pt")
    for end in (0, tokenizer.convert_tokens_to_ids("<|im_end|>")):
        found = model.generate(**ids, max_new_tokens=5, logits_processor=[
            lambda _, scores, end=end: scores.index_fill(1, torch.tensor(end), 1e9)])
        assert found[:, ids.input_ids.shape[1] :].tolist() == [[end]] * 2
    assert tokenizer.chat_template == CHATML

def test_a_run_in_bf16(whole):
    """Catches what only a card's arithmetic would show: a policy whose weights are not fp32, stage
    3 without TF32; and a policy that is not saved at the task's temperature. That prior and policy
    begin with equal scores, whatever the rounding, is in the table."""
    run = whole("bf16")
    model = load_checkpoint(run.out / "policy")
    for tensor in model.state_dict().values():
        assert tensor.dtype == torch.float32 and (tensor != tensor.bfloat16()).any()
    assert run.tf32 and model.generation_config.temperature == 0.7

def test_stages_of_texts_learn_and_tell_it(whole):
    """Catches a stage that does not learn or has another's rate, sides of a pair that are swapped,
    a reward model that does not begin from the fine-tuned prior, and held-out figures that are not
    those of the models on disk on the prompts of the evaluation."""
    run, tokenizer = whole("hh"), build_tokenizer()
    base, prior, reward = (load_checkpoint(folder, folder.name == "reward") for folder in (
        run.out.parents[1] / "gpt_neox", run.out / "prior", run.out / "reward"))
    cfg, nats, gaps = brain.Config(**json.loads((run.out / "config.json").read_text())), [], []
    test = brain.load_task(cfg, "test", tokenizer)
    for prompt, *answers in brain.take(test, 0, 16, cfg.seed, "eval"):
        x, *ys = tokenizer([prompt, *answers]).input_ids
        y, chosen, rejected = ([*y, 0][:limit] for y, limit in zip(ys, (5, 8, 8), strict=True))
        nats.append(-plain_score(prior, x, y).item() / len(y))
        gaps.append((plain_reward(reward, x, chosen) - plain_reward(reward, x, rejected)).item())
    losses, right = [math.log1p(math.exp(-gap)) for gap in gaps], sum(gap > 0 for gap in gaps)

    (*first, told), (*second, judged) = run.lines("sft"), run.lines("reward")
    assert told["held_out"]["loss"] == pytest.approx(statistics.mean(nats), abs=1e-4)
    assert judged["held_out"]["loss"] == pytest.approx(statistics.mean(losses), abs=1e-4)
    assert judged["held_out"]["accuracy"] == right / 16 > 0.8
    for lines, rate in (first, 2e-2), (second, 1e-3):
        assert lines[0]["loss"] > lines[-1]["loss"] and lines[0]["learning_rate"] == rate
    a, b, c = (model.get_input_embeddings().weight for model in (base, prior, reward))
    assert 0 < (b - c).norm() < (a - b).norm() / 2

class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self):
        return True

def test_bars_where_somebody_looks(world, tmp_path, monkeypatch):
    """Catches a terminal without bars, and a refresh that is not told beside them."""
    monkeypatch.setattr(io, "StringIO", Terminal)
    ran = run_main(command(tmp_path, **WORLD | dict(
        task="jsonl", prior=world / "prior", reward=world / "reward", data_dir=world, steps=2)))
    assert ran.status == 0 and re.search(r"^brain\W+step 0\b", ran.stdout, re.M)
    for what in ("reading train", "brain"):
        assert re.search(rf"\r{what}: .*it/s", ran.stderr), ran.stderr

# ---- 5 The folder: kill it, fill the disk, start it twice: the same command continues ------------

BRIEF = dict(steps=6, save_every=3, sft_batch=2, reward_batch=2, samples_per_prompt=2,
             prompts_per_step=2, prompts_per_refresh=4, eval_prompts=3)  # 6 + 6 + 6 steps
REMOVALS = {"os.remove", "os.rmdir", "shutil.rmtree"}
AUDITED = {"open", "os.mkdir", "os.rename", "os.truncate", "fsync", *REMOVALS}
SIGNALS = {"before": signal.SIGKILL, "wait": signal.SIGSTOP}
NEW, AGAIN = 0, 1  # a run in a new folder, and the same command once it is finished
FAULTS = {  # how: status, and where it strikes: a run, an operation, which of this name
    "before": (-9, [(NEW, "os.rename state.pt.part", 0), (AGAIN, "os.rename policy.part", 0)]),
    "after": (-9, [(NEW, "open config.json", 0), (NEW, "open state.pt.part", 5)]),
    "stop": (130, [(NEW, "open tokenizer_config.json", 2)]),
    "full": (1, [(NEW, "open metrics.jsonl", 9), (NEW, "fsync state.pt.part", 4)]),
    "limit": (1, [(NEW, "open state.pt.part", 5), (NEW, "os.mkdir reward.part", 0)])}

def few_rows(cfg, split, tokenizer):
    """Toy's first rows: six steps of two in stages 1 and 2."""
    return itertools.islice(brain.read_toy(cfg, split, tokenizer), 12 if split == "train" else 3)

def fault(out, at=0, how=None, also=None):
    """What befalls a child, after also(), at the at-th operation that changes files of its folder:
    it is killed before or after that, Ctrl-C is pressed (stop), it stands still (wait), the disk is
    full from then on, or no file can grow beyond a limit. Python's audit events are the operations,
    and OUT.places has their names."""
    places, count, fsync = f"{out}.places", itertools.count(1), os.fsync

    def die(frame, *_):
        if frame.f_code is not hear.__code__:  # but what comes next: the operation is done
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event, args):
        if event not in AUDITED or event == "open" and not args[2] & os.O_ACCMODE:
            return
        if not str(args[0]).startswith(str(out)) and event not in REMOVALS:
            return

        os.write(places, f"{event} {os.path.basename(args[0])}\n".encode())
        number = next(count)
        if how == "full" and number >= at and event not in REMOVALS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if how == "stop" and number == at:
            raise KeyboardInterrupt
        if how == "limit" and number == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        if how == "after" and number == at:
            sys.setprofile(die)
        if how in SIGNALS and number == at:
            os.kill(os.getpid(), SIGNALS[how])

    def begin():
        nonlocal places
        brain.TASKS["toy"] = brain.TASKS["toy"]._replace(read=few_rows)
        os.fsync = lambda file: sys.audit("fsync", f"{out}/state.pt.part") or fsync(file)
        if also:
            also()
        places = os.open(places, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.addaudithook(hear)

    return begin

def run_in(out, status=0, also=None, at=0, how=None, **flags):
    """A child that runs BRIEF in a folder and must end with this status, or with 2 where the disk
    was full before it began: what it said on stdout, or the one line of stderr where it failed."""
    ran = fork(out, fault(out, at, how, also), **BRIEF | flags)
    assert ran.status == status or (ran.status, how) == (2, "full"), ran
    assert re.fullmatch("brain.py: .+\n" if ran.status > 0 else "", ran.stderr), ran.stderr
    return ran.stderr or ran.stdout

def snapshot(folder):
    """Every file below a folder but the lock, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "lock"}

def ending(out):
    """All that is equal in two runs of one command: also the names of all files, and the report."""
    report = (out / "report.md").read_text().splitlines()
    return outcome(out), [*snapshot(out)], [line for line in report if "--out" not in line]

def state_of(out):
    """Stage, step and number of threads of a folder's state, which must be whole."""
    new = dict(stage="sft", step=0, threads=1)
    state = torch.load(out / "state.pt") if (out / "state.pt").exists() else new
    return state["stage"], state["step"], state["threads"]

def steps_of(out, stage):
    """How many steps of a stage metrics.jsonl holds."""
    lines = lines_of(out) if (out / "metrics.jsonl").exists() else []
    return sum(line["stage"] == stage and "step" in line for line in lines)

def names_first(out, stage, step):
    """Whether the first line of the last run's output names a stage and a step."""
    first = Path(f"{out}.stdout").read_text().splitlines()[0]
    return re.search(rf"{stage}\W+step {step}\b", first)

def nth(places, name, which):
    """The number of an operation, from 1 on."""
    return [i for i, place in enumerate(places, 1) if place == name][which]

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happens to, twice: its folder, and the operations of both."""
    torch.optim.AdamW(build_model().parameters()).step()  # what it imports, no child need import
    out, places = tmp_path_factory.mktemp("unbroken") / "run", []
    for stage, step in ("sft", 0), ("brain", 6):
        run_in(out)
        assert names_first(out, stage, step)
        assert [steps_of(out, name) for name in ("sft", "reward", "brain")] == [6, 6, 6]
        places.append(Path(f"{out}.places").read_text().splitlines())
    return out, places

@pytest.fixture(scope="module")
def stopped(unbroken, tmp_path_factory):
    """The folder of a run that was killed in stage 3, a step behind its last state."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run_in(out, -9, at=nth(unbroken[1][NEW], "open metrics.jsonl", 20), how="before")
    assert state_of(out) == ("brain", 4, 1) and steps_of(out, "brain") == 5
    return out

@pytest.mark.parametrize("how", FAULTS)
def test_killed_at_a_file_operation(how, unbroken, tmp_path):
    """Catches a kill, a full disk or Ctrl-C that a run does not survive, or that changes a number:
    state that is lost or half written, metrics written twice, files that are not whole, work that
    is done again without need, a first line that does not say where the run continues. All places,
    of a new run and of one that is finished: KILLS=all python -m pytest -s -k killed_at."""
    (folder, runs), (status, places), want = unbroken, FAULTS[how], ending(unbroken[0])
    tried = [(run, nth(runs[run], name, which)) for run, name, which in places]
    if os.environ.get("KILLS") == "all" and how != "limit":
        tried = [(run, at) for run in (NEW, AGAIN) for at in range(1, len(runs[run]) + 1)]

    for run, at in tried:
        out = tmp_path / f"{run} {at}"
        if run == AGAIN:
            shutil.copytree(folder, out)
        told = run_in(out, status, at=at, how=how)
        assert "continue" in told or how != "stop"
        stage, step, _ = state_of(out)
        assert steps_of(out, stage) - step <= 4, "more is lost than --save_every says"
        run_in(out)
        assert names_first(out, stage, step)
        assert ending(out) == want, f"{how} {runs[run][at - 1]}: it ends in another way"
        shutil.rmtree(out)
    print(f"{how}: {len(tried)} places")

def keep_only(name, out):
    """Nothing in the folder but somebody's file."""
    shutil.rmtree(out)
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")

SPOILT = {  # what is done to a copy of a run's folder; flags; what a refusal names, or None
    "half a state": (lambda out: os.truncate(out / "state.pt", 5000), {}, "--out"),
    "an empty state": (lambda out: os.truncate(out / "state.pt", 0), {}, "--out"),
    "no state": (lambda out: os.remove(out / "state.pt"), {}, "--out"),
    "a foreign state": (lambda out: torch.save({"epoch": 3}, out / "state.pt"), {}, "--out"),
    "a pickle": (lambda out: (out / "state.pt").write_text(f"cos\nmkdir\n(S'{out}/no'\ntR."), {},
                 "--out"),
    **{name: (partial(keep_only, name), {}, "--out")
       for name in ("notes.txt", "report.md", "metrics.jsonl", "prior/config.json")},
    "another kl_coef": (bool, dict(kl_coef=0.3), "kl_coef.*0.4.*0.3"),
    "another reward": (bool, dict(reward="x.py"), "reward.*None.*x.py"),
    "another seed, more steps": (bool, dict(seed=1, steps=7), "(?=.*seed.*0.*1)(?=.*steps.*6.*7)"),
    "free flags": (bool, dict(data_dir="x", save_every=1, micro_batch_tokens=16000), None),
    "no metrics": (lambda out: os.remove(out / "metrics.jsonl"), {}, None),
    "half a line": (lambda out: os.truncate(out / "metrics.jsonl", 3000), {}, None),
    "remains": (lambda out: shutil.copytree(out / "prior", out / "policy.part"), {}, None),
    "a finished run's policy": (lambda out: shutil.rmtree(out / "policy"), {}, None),
    "a finished run's report": (lambda out: os.remove(out / "report.md"), {}, None)}

@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_and_continued(what, unbroken, stopped, tmp_path):
    """Catches a traceback, a pickle that is executed, files of others that are written or removed,
    or a run that goes on as another one; metrics from elsewhere than the state, another number of
    threads, whose sums are others, and a refusal of flags that may change, as --out may."""
    spoil, flags, names = SPOILT[what]
    out = shutil.copytree(unbroken[0] if "finished" in what else stopped, tmp_path / "run")
    spoil(out)
    before = snapshot(out)
    told = run_in(out, 2 if names else 0, lambda: torch.set_num_threads(2), **flags)
    if names:
        assert re.search(names, told) and f"--out {out}" in told, told
        assert snapshot(out) == before and not (out / "no").exists()
    else:
        assert ending(out) == ending(unbroken[0]) and state_of(out) == ("brain", 6, 1)

def test_the_folder_is_claimed_before_the_first_step(unbroken, tmp_path):
    """Catches a run that dies before it has trained, and then goes on as another run."""
    out = tmp_path / "run"
    run_in(out, 130, at=nth(unbroken[1][NEW], "open metrics.jsonl", 1), how="stop")
    assert not lines_of(out) and re.search("seed.*0.*1", run_in(out, 2, seed=1))

def test_two_runs_at_once(unbroken, stopped, tmp_path):
    """Catches two processes that write into one folder, and a lock that outlives its process."""
    out = shutil.copytree(stopped, tmp_path / "run")
    at = nth(unbroken[1][AGAIN], "open metrics.jsonl", 0)
    child = fork(out, fault(out, at, "wait"), False, **BRIEF)
    os.waitpid(child, os.WUNTRACED)
    try:
        before = snapshot(out)
        assert f"--out {out}" in run_in(out, 2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert snapshot(out) == before
    run_in(out)

def test_the_lock(unbroken, tmp_path, monkeypatch):
    """Catches a lock that is held after `main` has returned, and a run that stops, or says that
    another one is there, on a file system without locks."""
    out = shutil.copytree(unbroken[0], tmp_path / "run")
    monkeypatch.setitem(brain.TASKS, "toy", brain.TASKS["toy"]._replace(read=few_rows))

    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with recorded("execute"):  # which keeps the runs alive
        assert [run_main(command(out, **BRIEF)).status for _ in range(2)] == [0, 0]
        monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
        ran = run_main(command(out, **BRIEF))
        assert ran.status == 0 and "--out" in ran.stdout

def test_stages_that_are_skipped_are_not_named(unbroken, tmp_path):
    """Catches a first line, metrics or folders of stages whose checkpoints are given; and a run
    that diverges and has no way out: with a lower rate it needs another --out."""
    given = {name: unbroken[0] / name for name in ("prior", "reward")}
    for stage, flags in ("reward", dict(prior=given["prior"])), ("brain", given):
        out = tmp_path / stage
        assert re.search(rf"{stage}\W+step", run_in(out, 1, lr=1e9, reward_lr=1e9, **flags))
        assert names_first(out, stage, 0) and not [*out.glob("*/")]
        assert len(lines_of(out)) == steps_of(out, stage)
        told = run_in(out, 2, lr=1e-3, reward_lr=1e9, **flags)
        assert re.search(r"\blr.*1000000000.*0.001", told) and f"--out {out}" in told

POISONED = {  # which function's result is not finite, and whether it is asked with gradients
    "loss": ("sequence_log_prob", True), "gradient": ("sequence_log_prob", True),
    "sample": ("sequence_log_prob", False), "pair": ("score_reward", True),
    "reward": ("score_reward", False), "infinite reward": ("score_reward", False)}

def poison(out, lines, kind):
    """From so many lines of metrics.jsonl on, a number of one prompt is not finite."""
    name, gradients = POISONED[kind]
    real = getattr(brain, name)

    def poisoned(*args):
        x = real(*args)
        begun = (out / "metrics.jsonl").exists() and len(lines_of(out)) >= lines
        if begun and x.requires_grad == gradients:
            bad = torch.zeros_like(x).index_fill(0, torch.tensor(0), math.nan)
            bad = bad.nan_to_num(math.inf) if kind == "infinite reward" else bad
            x.register_hook(bad.add) if kind == "gradient" else x.data.add_(bad)
        return x

    setattr(brain, name, poisoned)

@pytest.mark.parametrize("stage, step, kind, state", [
    ("sft", 4, "loss", ("sft", 3)), ("sft", 5, "gradient", ("sft", 3)),
    ("reward", 4, "pair", ("reward", 3)), ("brain", 2, "sample", ("reward", 6)),
    ("brain", 4, "infinite reward", ("brain", 4)), ("brain", 3, "loss", ("reward", 6)),
    ("eval", 6, "reward", ("brain", 6))])
def test_what_is_not_finite_stops_the_run(stage, step, kind, state, tmp_path):
    """Catches NaN of one prompt that reaches the weights or the report, a step that is logged as if
    it were good, a good state that is lost, a message that does not say where."""
    out, lines = tmp_path / "run", step + dict(sft=0, reward=7, brain=14, eval=14)[stage]
    told = run_in(out, 1, partial(poison, out, lines, kind))
    assert re.search(stage if stage == "eval" else rf"{stage}\W+step {step}\b", told), told
    assert len(lines_of(out)) == lines and state_of(out) == (*state, 1)

def exported(tmp_path, model, tokenizer):
    """What Run.export leaves at the final name."""
    cfg = brain.Config(temperature=0.7)
    run = SimpleNamespace(tokenizer=tokenizer, out=tmp_path, ends=[0, 7], cfg=cfg)
    brain.Run.export(run, model, "policy")
    return tmp_path / "policy"

def test_the_policy_generates_as_it_was_trained(tmp_path):
    """Catches a prior's own settings of `generate` kept in policy/, one end of several, a chat
    template that is lost, and a policy that cannot generate for two prompts at once."""
    model, tokenizer = build_model(), build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=1.3, min_p=0.2, num_beams=4, top_k=7, eos_token_id=5)
    folder = exported(tmp_path, model, tokenizer)
    kept = json.loads((folder / "generation_config.json").read_text())
    kept = {key: value for key, value in kept.items() if value is not None and key[0] != "_"}
    assert kept.pop("transformers_version") and kept == dict(
        do_sample=True, temperature=0.7, top_k=0, top_p=1.0, eos_token_id=[0, 7], pad_token_id=0)

    policy, own = load_checkpoint(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert own.chat_template == tokenizer.chat_template
    torch.testing.assert_close(policy.state_dict(), model.state_dict(), rtol=0, atol=0)
    both = own([" the cat", " so"], padding=True, return_tensors="pt")
    assert policy.generate(**both, max_new_tokens=2).shape[0] == 2

WRITTEN = {  # in place of a model's tensors
    "one is lost": lambda weights: dict([*weights.items()][1:]),
    "they are rounded": lambda weights: {key: x.bfloat16() for key, x in weights.items()},
    "the last is another": lambda weights: weights | {"lm_head.weight": -weights["lm_head.weight"]},
    "one is unknown": dict, "there are none": lambda weights: {}}

@pytest.mark.parametrize("what", WRITTEN)
def test_what_is_exported_is_read_back(what, tmp_path):
    """Catches a policy on disk that is not the one that was trained, in the place of a good one: a
    tensor is lost, rounded, another, or, as an adapter's, unknown to who reads the checkpoint."""
    model, tokenizer = build_model(), build_tokenizer()
    before, save = snapshot(exported(tmp_path, model, tokenizer)), model.save_pretrained
    if what == "one is unknown":
        model.extra = torch.nn.Parameter(torch.ones(2))
    model.save_pretrained = lambda part: save(part, state_dict=WRITTEN[what](model.state_dict()))
    with pytest.raises(brain.Guard):
        exported(tmp_path, model, tokenizer)
    assert snapshot(tmp_path / "policy") == before

# ---- 6 Bad input: one line that says what is wrong and where -------------------------------------

PAIR, USER = GOOD_ROWS["hh"][1][0], CHAT["prompt"]
BARE = ("--task=jsonl --device=cpu --steps=1 --samples_per_prompt=2 --max_prompt_tokens=32 "
        "--max_response_tokens=4 --max_comparison_tokens=4")
PRIOR, DATA = BARE + " --prior={prior}", " --data_dir={data}"
GIVEN = PRIOR + " --reward={reward}"
TLDR, HH = (GIVEN.replace("jsonl", task) + " --data_dir={root}" for task in ("tldr", "hh"))
COMMANDS = {  # name: a command, and what must be told
    "flag": ("--stepz=5", "--stepz"), "abbreviated": ("--temp=5", "--temp"),
    "word": ("toy", "toy"), "no value": ("--steps", "--steps"), "task": ("--task=sum", "--task"),
    "choice": ("--target=best", "--target.*best"), "number": ("--steps=many", "--steps.*many"),
    "count": ("--steps=1.5", "--steps.*1.5"), "no steps": ("--steps=0", "--steps.*1.* 0"),
    "nan": ("--kl_coef=nan", "--kl_coef.*nan"), "seed": ("--seed=-1", "--seed.* 0.*-1"),
    "huge": ("--sft_batch=4000000000", "--sft_batch.*4000000000"),
    "penalty": ("--missing_eos_penalty=-1", "--missing_eos_penalty.* 0.*-1"),
    "one sample": ("--samples_per_prompt=1", "--samples_per_prompt.* 2.* 1"),
    "one drawn": ("--eval_samples=1", "--eval_samples.* 2.* 1"),
    "two prompts": ("--eval_prompts=2", "--eval_prompts.* 3.* 2"), "empty": ("--out=", "--out"),
    "byte": ("--prior=/a\udcff", "--prior"),
    "refresh": ("--prompts_per_step=16 --prompts_per_refresh=40", "--prompts_per_refresh"),
    "both": ("--base={prior} --prior={prior}", "--base"), "no model": (BARE, "--base.*--prior"),
    "reverse": ("--divergence=reverse --target=argmax", "--divergence.*--target"),
    "variance": ("--divergence=log_variance --baseline=none", "--divergence.*--baseline"),
    "no GPU": ("--device=cuda", "CUDA.*--device"), "tldr": ("--task=tldr", "CUDA.*--device"),
    "out is a file": ("--device=cpu --out={file}", "--out.*/file"),
    "out is not mine": ("--device=cpu --out={data}", "--out.*/data"),
    "title": (TLDR, r"datasets/tldr_3_filtered/train\.jsonl:2: .*title"),
    "no pair": (PRIOR + " --data_dir={bare}", "chosen.*--reward"),
    "no reference": (GIVEN.replace("--prior", "--base") + " --data_dir={bare}", "reference"),
    "template": (GIVEN.replace("prior}", "strict}") + " --data_dir={chat}", "Template.* no"),
    "context": (GIVEN + DATA + " --max_prompt_tokens=637", "/prior.*640.*--max_"),
    "offline": (BARE + DATA + " --base=nobody/nothing", "nobody/nothing")}
BAD_ROWS = {  # name: the second row of a train.jsonl, or its bytes, and what must be told of it
    "no_json": (b"prompt: why", ""), "latin": ('{"prompt": "café"}'.encode("latin-1"), ""),
    "no_object": ([1], "object"), "blank": ({"prompt": " \n"}, "prompt"),
    "number": ({"prompt": "why", "reference": 3}, "reference"),
    "surrogate": ({"prompt": "why \ud800"}, ""), "texts": ({"prompt": ["why"]}, "prompt"),
    "pairs": ({"prompt": [[["role", "user"], ["content", "why ?"]]]}, "prompt"),
    "message": ({"prompt": [{"role": "user"}]}, "content"),
    "answered": ({"prompt": [*USER, {"role": "assistant", "content": "so"}]}, "prompt.*answer"),
    "answers": ({"prompt": USER, "reference": USER * 2}, "reference"),
    "alone": ({"prompt": "why", "chosen": "yes"}, "rejected")}
CODE = {  # name: what is in a FILE.py, and what must be told of it
    "syntax": ("import json\ndef reward(:\n", r"SyntaxError.*\b2\b"),
    "imports": ("\nimport no_such\n", ":2: ModuleNotFoundError.*no_such"),
    "exits": ("raise SystemExit\n", ":1: SystemExit"), "noun": ("reward = 1\n", r"reward\("),
    "async": ("async def reward(p, r, f):\n    return [1.0] * len(r)\n", r"reward\("),
    "two": ("def reward(p, r):\n    return [1.0] * len(r)\n", "TypeError")}
VALUES = {  # name: what reward(p, r, f) makes of two responses, and what must be told of it
    "raises": ("{}['label']", ":3: KeyError.*label"), "short": ("[1.0]", r"\b2\b.*\b1\b"),
    "none": ("None", r"\b2\b.*None"), "mapping": ("{text: 1.0 for text in r}", r"\b2\b.*dict"),
    "words": ("['1'] * 2", r"\b2\b.*str"), "column": ("numpy.ones((2, 1))", r"\b2\b.*list")}

def edit(path, **changes):
    """Change fields of a .json file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def spoil_weights(folder):
    """One weight is NaN."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    next(iter(weights.values()))[0, 0] = math.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})

def change_tokenizer(folder, more=(), **changes):
    """The checkpoint's tokenizer with more tokens and other attributes."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([*more])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)

def make_adapter(folder):
    """What peft leaves of a fine-tuned model."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()

FP8 = {"quantization_config": {"quant_method": "fp8"}}
CHECKPOINTS = {  # name: what befalls a copy of the prior, and what must be told of it
    "cut_weights": (lambda m: os.truncate(m / "model.safetensors", 9000), ""),
    "nans": (spoil_weights, r"nan\b"),
    "cut_config": (lambda m: os.truncate(m / "config.json", 30), ""),
    "no_tokenizer": (lambda m: [path.unlink() for path in m.glob("tok*")], "tokenizer"),
    "gemma": (lambda m: edit(m / "tokenizer_config.json", tokenizer_class="GemmaTokenizer"),
              "tokenizer"),
    "endless": (lambda m: change_tokenizer(m, eos_token=None), "eos"),
    "many": (lambda m: change_tokenizer(m, map(str, range(1000, 1050))), "embeddings"),
    "layers": (lambda m: edit(m / "config.json", num_hidden_layers=1), r"layers\.1"),
    "adapter": (make_adapter, "adapter.*merge"),
    "adapted": (lambda m: (m / "adapter_config.json").write_text("{}"), "adapter.*merge"),
    "fp8": (lambda m: edit(m / "config.json", **FP8), "quanti"),
    "inner": (lambda m: edit(m / "config.json", text_config=FP8), "quanti"),
    "awq": (lambda m: (m / "quant_config.json").touch(), "quanti"),
    "gptq": (lambda m: (m / "quantize_config.json").touch(), "quanti"),
    "gguf": (lambda m: (m / "config.json").rename(m / "model.gguf"), "quanti")}
EACH = {  # a command that ends in a name on the shelf: such names, and what must be told
    GIVEN + " --data_dir={root}/": {
        "none": r"none/train\.jsonl", "file": r"file/train\.jsonl", "few": "test.* 2 of 2",
        "folder": r"folder/train\.jsonl.*--data_dir", "void": "train.* 0 of 0", "chat": "template",
        "long": "train.* 0 of 1.* 1"} | {
        name: rf"/{name}/train\.jsonl:2: .*{told}" for name, (_, told) in BAD_ROWS.items()},
    HH + " --hh_subsets=": {
        "cut": r"cut/train\.jsonl\.gz", "plain": r"plain/train\.jsonl\.gz",
        "side": r"side/train\.jsonl\.gz:2: .*rejected", "parted": "train.* 0 of 1.* 1",
        "none": r"none/train\.jsonl\.gz.*--data_dir"},
    BARE + DATA + " --reward={code}/fine.py --prior={root}/": {
        "none": "/none", "file": "/file", "gguf/model.gguf": "/gguf/.*quanti", "mamba": "/mamba",
        "reward": "/reward"} | {
        name: f"/{name}.*{told}" for name, (_, told) in CHECKPOINTS.items()},
    PRIOR + DATA + " --reward={root}/": {
        "prior": "/prior", "adapter": "/adapter.*merge", "labels": "/labels.*label",
        "llama": r"/llama.*FILE\.py", "other_eos": r"FILE\.py", "fewer": r"FILE\.py",
        "bert": r"FILE\.py", "window": "/window.*gpt_neo", "none/json.py": r"none/json\.py"} | {
        f"code/{name}.py": rf"/{name}\.py.*{told}" for name, (_, told) in (CODE | VALUES).items()}}
BAD_INPUTS = COMMANDS | {
    f"{flags.split()[-1].partition('=')[0]}={name}": (flags + name, told)
    for flags, names in EACH.items() for name, told in names.items()}

@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Folders and files, good and broken, by name."""
    root = tmp_path_factory.mktemp("shelf")
    for name, rows in {"data": [TEXTS], "bare": [{"prompt": "why"}], "chat": [{"prompt": USER}],
                       "few": [TEXTS], "void": [], "long": [{"prompt": say(99, 0)}],
                       **dict.fromkeys(BAD_ROWS, [TEXTS])}.items():
        write_rows(root / name / "test.jsonl", [TEXTS] * (2 if name == "few" else 3))
        path = write_rows(root / name / "train.jsonl", rows)
        row, _ = BAD_ROWS.get(name, (b"", ""))
        line = row if isinstance(row, bytes) else json.dumps(row).encode()
        path.write_bytes(path.read_bytes() + line)
    for name, rows in {"cut": [PAIR] * 9, "plain": [], "side": [PAIR, {"chosen": "x"}],
                       "parted": [{"chosen": "a", "rejected": "b"}]}.items():
        write_rows(root / name / "train.jsonl.gz", rows)
    os.truncate(root / "cut/train.jsonl.gz", 90)
    (root / "plain/train.jsonl.gz").write_text(json.dumps(PAIR))
    write_rows(root / "datasets/tldr_3_filtered/train.jsonl", [POST, {**POST, "title": None}])
    (root / "folder/train.jsonl").mkdir(parents=True)
    (root / "file").write_text("a file")

    function = "import numpy\ndef reward(p, r, f):\n    return {}\n"
    codes = {name: function.format(value) for name, (value, _) in VALUES.items()}
    (root / "code").mkdir()
    for name, text in (codes | {name: text for name, (text, _) in CODE.items()}).items():
        (root / f"code/{name}.py").write_text(text)
    (root / "code/fine.py").write_text(function.format("[len(text) for text in r]"))

    save_checkpoint(root / "prior")
    save_checkpoint(root / "mamba", "mamba", state_size=4)
    save_checkpoint(root / "reward", reward=True)
    save_checkpoint(root / "fewer", reward=True, vocab_size=408)
    for family in ("llama", "bert"):
        save_checkpoint(root / family, family, reward=True)
    save_checkpoint(root / "window", "gpt_neo", reward=True, window_size=8, num_layers=2,
                    attention_types=[[["global", "local"], 1]])
    for name, (spoil, _) in CHECKPOINTS.items():
        spoil(Path(shutil.copytree(root / "prior", root / name)))
    for name in ("strict", "labels"):
        shutil.copytree(root / "prior", root / name)
    shutil.copytree(root / "reward", root / "other_eos")
    change_tokenizer(root / "other_eos", eos_token="Q")
    change_tokenizer(root / "strict", chat_template="{{ raise_exception('no') }}")
    KINDS[True].from_config(build_config(num_labels=2)).save_pretrained(root / "labels")
    return {path.name: path for path in root.iterdir()} | {"root": root}

def contents(folder):
    """Sizes and times of the files of a folder, but for Python's and those of a download."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".part")}

@pytest.mark.filterwarnings("error::RuntimeWarning")  # which would be a second line
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name, shelf, tmp_path, monkeypatch):
    """Catches a traceback, a hang, silence or a dead end for what users and their files get wrong,
    a folder that is begun, and a file of theirs that is touched."""
    if "GPU" in name and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it tries for 46 s
    monkeypatch.setattr(brain, "Stage", None)  # no command may get as far as training
    before, (command, told) = contents(shelf["root"]), BAD_INPUTS[name]
    line, _ = refused(command.format_map(shelf))
    assert re.search(told, line), line
    assert contents(shelf["root"]) == before
    assert {path.name for path in contents(tmp_path)} <= {"lock"}

def test_a_folder_whose_name_is_no_text(tmp_path, monkeypatch):
    """Catches a run that trains in a folder into which no policy can be written."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "--out" in refused("--device=cpu --out=run")[0] and not [*folder.iterdir()]

# -- Rewards of FILE.py, and what a run meets outside itself --

JUDGE_FILE = """import concurrent.futures
import torch
from neighbour import LETTER

def disturb():
    assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)

def count(text):
    return 1e8 + text.count(LETTER)

def reward(prompts, responses, references):
    disturb()
    assert prompts == [" so"] * 3 + [[{"role": "user", "content": "why ?", "name": "kim"}]] * 3
    assert references == [None] * 3 + [" yes"] * 3
    prompts[3].clear()  # its own to edit
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        return list(pool.map(count, responses))

disturb()
"""

def test_a_reward_is_the_number_that_was_returned(tmp_path):
    """Catches a reward that bf16 or fp32 has rounded, changes to torch's defaults that stay, a
    FILE.py that cannot import its neighbours or start processes, special tokens in its texts, and
    prompts and references of other rows."""
    (tmp_path / "neighbour.py").write_text("LETTER = 'a'\n")
    (tmp_path / "own_judge.py").write_text(JUDGE_FILE)
    (tmp_path / "random.py").write_text("def reward(p, r, f):\n    return [1.0] * len(r)\n")
    brain.load_reward(None, str(tmp_path / "random.py"), None)
    assert sys.modules["random"] is random, "a FILE.py is not in the way of another module"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}, so"
    run = fake_run(tokenizer=tokenizer, dtype=torch.bfloat16)
    run.reward = brain.load_reward(run, str(tmp_path / "own_judge.py"), None)
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()

    texts = [[" a cat", " no", " a day a"], [" so", f" a {EOS} a", " can"]]
    counts = torch.tensor([[2, 0, 3], [0, 1, 1]], dtype=torch.float64)
    examples = [brain.Example(" so"), brain.Example(USER, " yes")]
    ids = [[[*tokenizer.encode(text), 0] for text in row] for row in texts]
    (rollout,) = brain.split_batches(run, [*zip(examples, ids, strict=True)])
    brain.judge(run, rollout)
    assert rollout.figures["raw_reward"].tolist() == (1e8 + counts).tolist()
    assert examples[1].prompt[0]
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()

    zeros = torch.zeros(2, 3)
    alpha, _ = brain.snis_weights(zeros, zeros, zeros, rollout.reward, 0.5)
    torch.testing.assert_close(alpha, (counts / 0.5).softmax(-1), rtol=0, atol=1e-6)

def test_stage_3_is_rehearsed_at_the_start(shelf, tmp_path, monkeypatch):
    """Catches a sampler that is wrong and is noticed after hours, once stages 1 and 2 are over, a
    folder that belongs to such a run, and a rehearsal of fewer samples than a step has."""
    command = f"{GIVEN}{DATA} --out={tmp_path} --samples_per_prompt=5".format_map(shelf)
    real, asked = brain.sample, []

    def sample(model, prompts, n, *args, temperature, **options):
        asked.append(n)
        return real(model, prompts, n, *args, temperature=1.3 * temperature, **options)

    monkeypatch.setattr(brain, "sample", sample)
    assert "rehearsal" in refused(command)[0] and asked == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]

@pytest.mark.parametrize("place", ["sequence_log_prob", "score_reward", "sample"])
def test_memory_is_told_as_memory(place, shelf, tmp_path, monkeypatch):
    """Catches out of memory told as a model that is broken, by the block that it happens in."""
    command = f"{GIVEN}{DATA} --out={tmp_path}".format_map(shelf)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(brain, place, full)
    line, _ = refused(command, 1)
    assert re.search("--micro_batch_tokens.*--samples_per_prompt", line) and "gpt_neox" not in line

def test_memory_that_runs_out_on_a_cpu(shelf, tmp_path):
    """Catches a traceback where a step asks for more than there is."""
    def limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**27  # 128 MB more than now
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    ran = fork(tmp_path / "run", limit, task="jsonl", prior=shelf["prior"],
               reward=shelf["code"] / "fine.py", data_dir=shelf["data"], samples_per_prompt=30_000)
    assert ran.status == 1 and ran.stderr.count("\n") == 1, ran.stderr
    assert "--micro_batch_tokens" in ran.stderr

@pytest.mark.parametrize("encoding", [None, "ascii"])
def test_nobody_listens(encoding, shelf, tmp_path, monkeypatch):
    """Catches a run that trains, and then cannot print or write its report: stdout is closed, or
    the system knows no UTF-8."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"prompt": "why ☀ – Größe 犬 ?"}] * 3)
    command = f"{PRIOR} --reward={{code}}/fine.py --data_dir={tmp_path} --out={tmp_path}/run"
    stream = io.TextIOWrapper(io.BytesIO(), encoding) if encoding else None

    usual = locale.setlocale(locale.LC_CTYPE)
    monkeypatch.setattr(sys, "stdout", stream)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        status = brain.main(command.format_map(shelf).split())
    finally:
        locale.setlocale(locale.LC_CTYPE, usual)
        monkeypatch.undo()
    assert status == 0 and "±" in (tmp_path / "run/report.md").read_text(encoding="utf-8")

@pytest.mark.parametrize("task", ["toy", "tldr", "hh", "jsonl"])
def test_help_ends_with_the_tasks_preset(task):
    """Catches a --help that starts a run, lacks a flag, or does not say what the task changes."""
    ran = run_main(f"--task={task} --help")
    text, _, preset = ran.stdout.rpartition("\n\n")
    assert (ran.status, ran.stderr) == (0, "")
    assert all(f"    {name}: " in text for name in brain.Config.__dataclass_fields__)
    wanted = brain.TASKS[task].preset
    assert preset == f"{task}'s preset: {wanted | dict(out=f'out/{task}')}\n"

def test_flags_are_stronger_than_presets():
    """Catches a preset over a flag or under a default, or with its own models beside a --base."""
    cfg = brain.parse_config("--task=tldr --base=b --temperature=0.5".split())
    assert (cfg.base, cfg.prior, cfg.reward) == ("b", None, None)
    assert (cfg.temperature, cfg.sft_batch, cfg.reward_batch) == (0.5, 128, 64)

@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_system_without_locks(number, tmp_path, monkeypatch):
    """Catches a run that stops, or tells of another one, where no file can be locked."""
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(brain, "execute", lambda run: None)
    for _ in range(2):
        ran = run_main(f"--device=cpu --out={tmp_path}")
        assert (ran.status, ran.stderr) == (0, "")
        assert ("--out" in ran.stdout) == (number == errno.ENOLCK)  # else filelock helps itself

@pytest.mark.parametrize("error, status", [
    (KeyError("bug"), None), (RuntimeError("bug"), None), (KeyboardInterrupt(), 130),
    (OSError(errno.ENOSPC, "disk full"), 1), (SystemExit(), 1), (SystemExit(0), 0)])
def test_a_bug_shows_its_traceback(error, status, tmp_path, monkeypatch):
    """Catches a bug that is told as a user's mistake, and an end that is told as another."""
    def execute(run):
        raise error

    monkeypatch.setattr(brain, "execute", execute)
    command = f"--device=cpu --out={tmp_path}"
    if status is None:
        with pytest.raises(type(error)) as raised:
            brain.main(command.split())
        assert raised.value is error
    else:
        assert run_main(command).status == status

# ---- 7 The front page: its commands parse, its snippets run, its names exist ---------------------

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)

def section(first, last):
    """README from one heading to another."""
    return README[README.index(f"## {first}") : README.index(f"## {last}")]

def snippet(language, word):
    """The one code block in this language that has the word."""
    (found,) = (code for kind, code in BLOCK.findall(README) if kind == language and word in code)
    return found

def names_of(code):
    """The names that a snippet leaves behind."""
    names = {"__name__": "snippet"}
    exec(compile(code, "README.md", "exec"), names)
    return names

def test_readme_commands_parse():
    """Catches a command with a flag, a value, a make rule or a program that does not exist."""
    ours = README.replace(section("Outgrowing", "Licence"), "")  # less TRL's flags
    shell = "\n".join(code for kind, code in BLOCK.findall(ours) if kind == "sh")
    lines = shell.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", ours))
    rules = re.findall(r"^(\w+):", (HERE / "Makefile").read_text(encoding="utf-8"), re.M)
    flags = {f"--{field.name}" for field in fields(brain.Config)} | {"--help"}

    parsed = 0
    for line in lines:
        words = shlex.split(line, comments=True) if re.match("python |make |--", line) else []
        if words[:2] == ["python", "test_brain.py"]:
            assert words[2] in ("bench", "compare", "capitals"), line
        elif words[:1] == ["make"]:
            assert words[1] in rules, line
        elif len(words) == 1:
            assert words[0] in flags, line
        elif words and words[1] != "-m" and "--help" not in words:
            task = ["--task=jsonl"] if words[0] in ("--base", "--prior") else []
            given = words[2:] if words[0] == "python" else words
            assert brain.parse_config(["--prompts_per_step=1", *task, *given]), line
            parsed += 1
    assert parsed > 20

def test_readme_names_exist():
    """Catches a test, a function or a heading that was renamed, and a link to nowhere."""
    tests = Path(__file__).read_text(encoding="utf-8")
    claims = re.findall(r"^\|.*", section("From the paper to the code", "Relatives"), re.M)
    found = re.findall(r"`(\w+)`", "".join(claims)) + re.findall(r"`(test_\w+)`", README)
    for name in found + re.findall(r"pytest .*-k (\w+)", README):
        assert name in dir(brain) or re.search(rf"def \w*{name}\w*\(", tests), name

    titles = re.findall("^#+ (.*)", README, re.M)
    slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert {*re.findall(r"\]\(#([^)]+)\)", README)} <= slugs

def test_readme_loss_is_brain_loss():
    """Catches six lines on the first screen that are not the loss."""
    draw = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = draw[0].requires_grad_()
    values = (names_of(snippet("python", "def loss("))["loss"](policy, *draw[1:], 0.7),
              brain.brain_loss(policy, *draw[1:], 0.7)[0])
    slopes = [torch.autograd.grad(value.sum(), policy)[0] for value in values]
    for found in (values, slopes):
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)

def test_readme_rows_are_read(tmp_path):
    """Catches an example row that is refused, chat rows among them."""
    (tmp_path / "train.jsonl").write_text(snippet("json", "role"), encoding="utf-8")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    cfg = brain.parse_config(["--task=jsonl", "--prior=M", f"--data_dir={tmp_path}"])
    given = [[column for column in ("reference", "chosen", "rejected") if getattr(row, column)]
             for row in brain.load_task(cfg, "train", tokenizer)]
    assert given == [[], ["chosen", "rejected"], ["reference"]]

@pytest.mark.parametrize("family", ["bert", "gpt_neox"])
def test_readme_rewards(family, tmp_path):
    """Catches a reward function that cannot judge, and a judge.py whose batch changes a score."""
    reward = names_of(snippet("python", "right, in their places"))["reward"]
    assert reward(["x"] * 4, ["AB", "Ab", "", "ABCD"], ["AB"] * 4) == [1, 0.5, 0, 0.5]

    tokenizer = build_tokenizer()
    tokenizer.pad_token = EOS
    for part in (build_model(family, reward=True), tokenizer):
        part.save_pretrained(tmp_path)
    code = re.sub("NAME = .*", f"NAME = {str(tmp_path)!r}", snippet("python", "# judge.py"))
    code += snippet("python", "decoder does not look") * (family != "bert")
    judge = names_of(code)["reward"]
    pairs = [("a", " it is"), ([{"role": "user", "content": "is it you ?"}], " no"),
             ("is it you ?", " no")]
    alone = [judge([x], [y], [None])[0] for x, y in pairs]
    assert judge(*zip(*pairs, strict=True), [None] * 3) == pytest.approx(alone, abs=1e-4)
    assert alone[0] != alone[1] == alone[2]  # a chat row is read by its message

def test_readme_shows_what_a_run_leaves(tmp_path, monkeypatch, capsys):
    """Catches a file, a metric or a figure that README misses or invents, and a snippet that no
    longer runs on a run's folder, or shows something else."""
    monkeypatch.chdir(tmp_path)
    few = "--steps=2 --sft_epochs=1 --reward_epochs=1 --prompts_per_step=8 --prompts_per_refresh=8"
    assert brain.main([*few.split(), "--eval_prompts=3"]) == 0
    files, metrics = (" ".join(re.findall(r"^\| (`.*?) \|", part, re.M)) for part in (
        section("What a run leaves", "The method"), section("Metrics", "Troubleshooting")))
    assert {*re.findall(r"`([\w.]+)", files)} == {*os.listdir("out/toy")}
    lines = Path("out/toy/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {key for line in lines for key in json.loads(line)} - {"stage", "step"}
    assert logged == {*re.findall(r"`(\w+)", metrics)}
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*re.findall(r'"(\w+)": ', snippet("json", '"task"'))} <= {*figures}

    transformers.set_seed(0)
    names_of(snippet("python", "AutoModelForCausalLM"))
    words = {*brain.KEYS, *brain.FILLERS, brain.TLDR.strip()}
    assert {*re.findall(r"[\w:;]+", capsys.readouterr().out)} <= words
    names_of(snippet("python", "effective_sample_size"))  # the loss alone, in a loop
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses == sorted(losses, reverse=True) and len(losses) == 3
    for kind, code in BLOCK.findall(README):
        assert kind != "python" or compile(code, "README.md", "exec")

def record_recipe():
    """Runs recipe.py as the program that it is. Notes each loss and reward, and at the start and in
    the second step of the second refresh the policy, the ids and the gradient."""
    import trl

    kept, loss_of = {"seen": [], "steps": []}, brain.brain_loss
    train = trl.RLOOTrainer.training_step

    def watched_loss(log_policy, log_prior, log_proposal, reward, **dials):
        log_policy.retain_grad()
        found = loss_of(log_policy, log_prior, log_proposal, reward, **dials)
        kept["seen"].append([found[0].mean().item(), reward.mean().item()])
        kept["leaf"] = log_policy
        return found

    def watched_step(trainer, *inputs):
        step, model = trainer._step, trainer.accelerator.unwrap_model(trainer.model)
        policy = copy.deepcopy(model.state_dict())
        result = train(trainer, *inputs)
        if step in (8, 10, 11):  # two micro-batches are a step, four steps a refresh
            rows = trainer._buffered_inputs[step % 2]
            ids = [rows[name] for name in (
                "prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
            kept["steps"].append((policy, ids, kept["leaf"].grad))
        return result

    brain.brain_loss, trl.RLOOTrainer.training_step = watched_loss, watched_step
    runpy.run_path("recipe.py", run_name="__main__")
    del kept["leaf"]
    torch.save(kept, f"rank{os.environ['RANK']}.pt")

def launch_recipe(folder):
    """What two processes noted, of README's recipe and README's command in small."""
    (folder / "recipe.py").write_text(snippet("python", "# recipe.py"), encoding="utf-8")
    start = f"import {__name__}\n{__name__}.record_recipe()\n"
    (folder / "start.py").write_text(start, encoding="utf-8")
    shown = re.search(r"^    accelerate launch --num_processes 8 recipe.py (.*?)\n\n", README,
                      re.M | re.S)[1].replace("\\\n", " ")
    small = ("--max_steps 40 --max_completion_length 12 --learning_rate 6e-3 --use_cpu true "
             "--gradient_accumulation_steps 2 --bf16 false --report_to none --save_strategy no")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"

    ran = subprocess.run(
        [sys.executable, *launch.split(), "start.py", *shlex.split(shown), *small.split()],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ran.returncode == 0, ran.stdout[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]

@torch.no_grad()
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl==1.16.0")
def test_recipe_on_trl(tmp_path):
    """Catches a recipe that does not learn on two processes, and a loss that the trainer scales,
    masks or feeds otherwise: minus its gradient is α̂ − β̂, computed anew from ids and weights."""
    letters, config = "abcdefghijklmno", build_config(vocab_size=16)
    torch.manual_seed(0)
    prior = transformers.AutoModelForCausalLM.from_config(config).eval()  # ends after 16 or so
    prompts = [{"prompt": " ".join(letters[i % 15 :][: 1 + i // 15])} for i in range(32)]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    for part in (prior, word_tokenizer([EOS, *letters])):  # no pad token: TRL takes eos
        part.save_pretrained(tmp_path / "MODEL")
    ranks = launch_recipe(tmp_path)
    seen = torch.tensor([rank["seen"] for rank in ranks]).view(2, -1, 4, 2, 2).mean((0, 3))
    loss, reward = seen.unbind(-1)  # (refreshes, age): the loss jumps back at a refresh
    assert loss[:, -1].mean() < 0.8 * loss[:, 0].mean()
    assert reward[-3:].mean() > reward[:3].mean() + 0.5

    (proposal, *_), (policy, *_), _ = ranks[0]["steps"]
    models = [copy.deepcopy(prior) for _ in range(3)]
    for model, weights in zip(models, (policy, prior.state_dict(), proposal), strict=True):
        model.load_state_dict(weights)
        model.double()
    for _, ids, gradient in ranks[0]["steps"][1:] + ranks[1]["steps"][1:]:
        assert len(gradient) == 2 and not ids[-1].all()  # prompts, some with padded responses
        for x, shown, ys, masks, slope in zip(*ids, gradient, strict=True):
            x = x[0, shown[0].bool()].tolist()
            ys = [y[mask.bool()].tolist() for y, mask in zip(ys, masks, strict=True)]
            scores = torch.tensor([[[plain_score(model, x, y, 0.7) for y in ys]]
                                   for model in models], dtype=torch.float64)
            reward = torch.tensor([[-len(y) / 4 for y in ys]], dtype=torch.float64)
            alpha, beta = brain.snis_weights(*scores, reward, kl_coef=0.5)
            assert (scores[0] - scores[1]).std() > 0.01  # or no prior would do as well
            torch.testing.assert_close(-4 * slope.double(), (alpha - beta)[0], rtol=0, atol=1e-5)

# ---- 8 Programs: `python test_brain.py bench | compare | capitals`, the figures of README --------

def table(*cells, head=False):
    """Prints a row of a Markdown table: floats have three digits, NaN is –."""
    texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |".replace("nan", "–"), flush=True)
    if head:
        print("|---" * len(cells) + "|")

# `capitals FOLDER` writes README's task of own data that can be checked.

def reward(prompts, responses, references):
    """The share of letters that are right, in their places."""
    pairs = zip(responses, references, strict=True)
    return [sum(map(str.__eq__, y, z)) / max(len(y), len(z), 1) for y, z in pairs]

def write_capitals(argv):
    """Into a folder: 300 chats, in each a word to write in capitals, 60 of them held out, the
    function above as reward.py, and a base model of letters that knows nothing yet."""
    parser = argparse.ArgumentParser(prog="test_brain.py capitals")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    spelled = map("".join, itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst", "aeiou"))
    rows = [{"prompt": [{"role": "user", "content": f"Write this word in capitals: {word}"}],
             "reference": [{"role": "assistant", "content": word.upper()}]}
            for word in random.Random(0).sample([*spelled], 300)]
    write_rows(folder / "test.jsonl", rows[:60])
    write_rows(folder / "train.jsonl", rows[60:])
    (folder / "reward.py").write_text(inspect.getsource(reward), encoding="utf-8")

    tokenizer = word_tokenizer([EOS, *" :", *string.ascii_letters], letters=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = build_config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256,
                          max_position_embeddings=64, rotary_pct=1.0)
    KINDS[False].from_config(config).save_pretrained(folder / "base")

def test_capitals(tmp_path):
    """Catches a first task of a user's own that cannot be run, and a reward that does not prefer
    the right answer."""
    write_capitals([str(tmp_path)])
    assert reward([""] * 3, ["BADA", "BAda", "BADAM"], ["BADA"] * 3) == [1, 0.5, 0.8]
    ran = run_main(f"--task=jsonl --data_dir={tmp_path} --base={tmp_path}/base --steps=1 "
                   f"--reward={tmp_path}/reward.py --out={tmp_path}/out --max_prompt_tokens=40 "
                   "--max_response_tokens=8 --max_comparison_tokens=8 --eval_prompts=4 "
                   "--prompts_per_step=2 --prompts_per_refresh=2")
    assert ran.status == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["reward_reference"] == 1

# `bench`: branches against one row per response, the rows at their best: all lengths are equal, so
# there is no mask, and only response positions pass the head. With `--device cuda` the same on a
# card. Where TRL is installed, a step of its RLOOTrainer stands beside.

@dataclass
class Sizes:
    """Flags of the benchmark, of a GPT-NeoX with random weights."""

    device: str = "cpu"  # or cuda, with the sizes of ON_CARD
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    vocabulary: int = 8192
    prompt_tokens: int = 350  # P
    response_tokens: int = 53  # R
    samples: list[int] = field(default_factory=lambda: [2, 8, 32])  # n
    prompts: int = 2  # of a step
    micro_batch: int = 1  # prompts of a forward pass
    batches: list[int] = field(default_factory=lambda: [2])  # prompts to sample for at a time
    repeats: int = 2  # after one to warm up; the median counts
    threads: int = 2

ON_CARD = dict(hidden=2048, layers=16, vocabulary=50304, prompt_tokens=400, samples=[8], prompts=32,
               micro_batch=32, batches=[4, 32, 96])

def rows_of(model, xs, ys):
    """Ids (B·n, P + R) of one row per response."""
    rows = [x + y for x, own in zip(xs, ys, strict=True) for y in own]
    return torch.tensor(rows, device=model.device)

def rows_log_prob(model, xs, ys):
    """log q(y|x), (B, n), from rows."""
    ids, R = rows_of(model, xs, ys), len(ys[0][0])
    logits = model(ids[:, :-1], logits_to_keep=R, use_cache=False).logits.float()
    return logits.log_softmax(-1).gather(-1, ids[:, -R:, None]).sum((1, 2)).view(len(xs), -1)

def rows_reward(model, xs, ys):
    """The reward at the last token, (B, n), from rows."""
    hidden = model.base_model(rows_of(model, xs, ys), use_cache=False).last_hidden_state
    return model.score(hidden[:, -1]).float().view(len(xs), -1)

def rows_sample(model, xs, n, R):
    """Ids (B, n, R) by `generate`."""
    ids = torch.tensor(xs, device=model.device)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=n,
                          do_sample=True, top_k=0, pad_token_id=0, min_new_tokens=R,
                          max_new_tokens=R)
    return rows[:, -R:].view(len(xs), n, R).tolist()

Layout = collections.namedtuple("Layout", "sample log_prob reward part", defaults=[1])
ROWS = Layout(rows_sample, rows_log_prob, rows_reward, part=8)  # of a micro-batch that is passed
BRANCHES = Layout(
    lambda model, xs, n, R: brain.sample(model, xs, n, R, eos_id=-1)[0],  # nothing ends
    lambda model, xs, ys: brain.sequence_log_prob(model, brain.pack(xs, ys, model.device)),
    lambda model, xs, ys: brain.score_reward(model, brain.pack(xs, ys, model.device)))

class Bench:
    """Models, held as brain.py holds them, and the passes of a step in either layout."""

    def __init__(self, sizes):
        self.sizes, self.cuda = sizes, sizes.device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.config = build_config(
            vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, pad_token_id=1, num_labels=1,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
            intermediate_size=4 * sizes.hidden, bos_token_id=None, eos_token_id=None,
            max_position_embeddings=sizes.prompt_tokens + sizes.response_tokens)

        torch.manual_seed(0)
        with torch.device(sizes.device):
            self.policy, reward = (KINDS[kind].from_config(self.config).eval() for kind in KINDS)
        for head in (self.policy.get_output_embeddings(), reward.score):
            head.forward = functools.partial(brain.exact_head, head.forward)
        self.reward = brain.freeze(reward, self.dtype)
        self.prior = brain.freeze(copy.deepcopy(self.policy), self.dtype)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)

    def draw(self, *shape):
        """Random ids, nested lists."""
        return torch.randint(2, self.sizes.vocabulary, shape).tolist()

    def parts(self, layout, *columns):
        """Micro-batches, of fewer prompts for rows, whose tokens are more."""
        size = max(1, self.sizes.micro_batch // layout.part)
        for i in range(0, len(columns[0]), size):
            yield [column[i : i + size] for column in columns]

    @torch.no_grad()
    def sample(self, layout, xs, n):
        """Responses to prompts, by the policy."""
        return layout.sample(self.policy, xs, n, self.sizes.response_tokens)

    @torch.no_grad()
    def score(self, layout, xs, ys):
        """log p, log q′ and rewards, (B, n) each."""
        found = [[layout.log_prob(self.prior, *part), layout.log_prob(self.policy, *part),
                  layout.reward(self.reward, *part)] for part in self.parts(layout, xs, ys)]
        return [torch.cat(column) for column in zip(*found, strict=True)]

    def gradient(self, layout, xs, ys, scores):
        """The gradient of BRAIn's loss."""
        self.policy.zero_grad()
        for x, y, *known in self.parts(layout, xs, ys, *scores):
            log_policy = layout.log_prob(self.policy, x, y)
            (brain.brain_loss(log_policy, *known, 0.5)[0].sum() / len(xs)).backward()

    def step(self, layout, xs, n):
        """A whole step that samples anew; its first two passes are a refresh."""
        ys = self.sample(layout, xs, n)
        self.gradient(layout, xs, ys, self.score(layout, xs, ys))
        self.optimizer.step()

    def time(self, run, *args):
        """Median seconds of run(*args)."""
        taken, wait = [], torch.cuda.synchronize if self.cuda else int
        for _ in range(1 + self.sizes.repeats):
            wait()
            began = time.perf_counter()
            with torch.autocast(self.sizes.device, torch.bfloat16, self.cuda):
                run(*args)
            wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])

def time_trl(bench, n):
    """Median seconds of a step of TRL's RLOOTrainer on models of the same shape, by its own clock,
    which leaves out the optimizer."""
    import datasets
    import trl

    sizes, words = bench.sizes, [chr(0x4E00 + i) for i in range(bench.sizes.vocabulary)]
    tokenizer = word_tokenizer(words, letters=True)
    tokenizer.pad_token = words[1]
    texts = map(tokenizer.decode, bench.draw(sizes.prompts * 9, sizes.prompt_tokens))
    bench.config.eos_token_id, size = 0, max(1, sizes.micro_batch // ROWS.part)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            KINDS[kind].from_config(bench.config).save_pretrained(f"{folder}/{kind}")
            tokenizer.save_pretrained(f"{folder}/{kind}")
        flags = trl.RLOOConfig(
            folder, per_device_train_batch_size=size * n, num_generations=n, beta=0.5,
            gradient_accumulation_steps=sizes.prompts // size, bf16=bench.cuda,
            max_completion_length=sizes.response_tokens, max_steps=1 + sizes.repeats,
            use_cpu=not bench.cuda, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1)
        trainer = trl.RLOOTrainer(
            f"{folder}/False", f"{folder}/True", flags, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": [*texts]}))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    rows = [row["step_time"] for row in trainer.state.log_history if "step_time" in row]
    return statistics.median(rows[1:])

def benchmark(argv):
    """Prints what a step costs: a row for each pass, and for each number of prompts to sample for.
    The peak of bytes (sampling) and of FLOP (6 a weight and token) is what a copy and a product
    reach here."""
    parser = transformers.HfArgumentParser(Sizes)
    parser.set_defaults(**ON_CARD if any("cuda" in word for word in argv) else {})
    sizes, = parser.parse_args_into_dataclasses(argv)
    torch.set_num_threads(sizes.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # both as in brain.py
    torch.backends.cuda.matmul.allow_tf32 = True
    bench, P, R = Bench(sizes), sizes.prompt_tokens, sizes.response_tokens
    print(f"{sizes}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    weights, (side, times) = bench.policy.num_parameters(), (8192, 50) if bench.cuda else (2048, 1)
    x = torch.randn(side, side, device=sizes.device, dtype=bench.dtype)
    flops = times * 2 * side**3 / bench.time(lambda: [x @ x for _ in range(times)])
    speed = times * 2 * x.nbytes / bench.time(lambda: [x.clone() for _ in range(times)])

    table("pass", "prompts", "n", "branches, s", "rows, s", "ratio", "limit", "tokens/s",
          "of the peak", "peak GB", head=True)
    for n in sizes.samples:
        ys = bench.draw(sizes.prompts, n, R)
        scores = torch.randn(3, sizes.prompts, n, device=sizes.device)
        passes = [("sample", B, n) for B in sizes.batches]
        passes += [("score", sizes.prompts, ys), ("gradient", sizes.prompts, ys, scores),
                   ("step", sizes.prompts, n)]
        for name, B, *args in passes:
            run, xs, theirs = getattr(bench, name), bench.draw(B, P), math.nan
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            ours, memory = bench.time(run, BRANCHES, xs, *args), torch.cuda.max_memory_allocated()
            if B <= sizes.prompts:  # more rows may not fit
                theirs = bench.time(run, ROWS, xs, *args)

            work = 6 * weights * B * (P + n * R) / flops  # of three models, or forward and backward
            if name == "sample":
                cache = 2 * sizes.layers * sizes.hidden * B * (P + n * R / 2)
                work = R * (weights + cache) * bench.dtype.itemsize / speed
            table(name, B, n, ours, theirs, theirs / ours, n * (P + R) / (P + n * R),
                  B * n * R / ours, math.nan if name == "step" else work / ours, memory / 1e9)
        if importlib.util.find_spec("trl"):
            theirs = time_trl(bench, n)
            table("step of TRL", B, n, ours, theirs, theirs / ours, *[math.nan] * 4)

    with torch.no_grad(), torch.autocast(sizes.device, torch.bfloat16, bench.cuda):
        ys, sampled = brain.sample(bench.policy, xs[:4], n, R, eos_id=-1)
        gap = (sampled - BRANCHES.log_prob(bench.policy, xs[:4], ys)).square().mean().item()
    print(f"\nsampled − scored: rms {math.sqrt(gap / R):.2g} nats a root token")

def test_benchmark_runs(capsys):
    """Catches a benchmark that nobody can repeat, and rows that are not what they are said to be:
    log-probabilities, rewards and gradients of both layouts agree."""
    small = ("--hidden 16 --layers 1 --heads 2 --vocabulary 64 --prompt_tokens 9 --repeats 1 "
             "--response_tokens 5 --prompts 2 --threads 1 --batches 1 3 --samples 2").split()
    benchmark(small)
    *_, said, gap = (line.split() for line in capsys.readouterr().out.splitlines() if line)
    assert float(gap[4]) < 1e-4 and said[1] == "step" and float(said[11]) > 0

    bench = Bench(transformers.HfArgumentParser(Sizes).parse_args_into_dataclasses(small)[0])
    xs, ys, scores, found = bench.draw(2, 9), bench.draw(2, 3, 5), torch.randn(3, 2, 3), []
    for layout in (BRANCHES, ROWS):
        bench.gradient(layout, xs, ys, scores)
        grads = [weight.grad.flatten() for weight in bench.policy.parameters()]
        found.append([*bench.score(layout, xs, ys), torch.cat(grads)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

# `compare`: the contest on toy. Each method runs brain.train_policy with its own loss on the same
# prior, reward model, prompts and number of samples; DPO alone takes the task's own pairs in the
# place of samples. As all responses can be listed, every figure is exact.

def peoples_dpo(s, beta):
    """DPO on pairs of which people chose the first."""
    return dpo(s._replace(reward=torch.tensor([1.0, 0.0]).expand_as(s.reward)), beta)

Method = collections.namedtuple(  # its first strength is tuned at; `against` is who it is held to
    "Method", "loss dial strengths n refresh proposal judge against",
    defaults=["kl_coef", (0.4, 0.2, 0.8, 1.6), 8, 4, "lagged", "learned", "BRAIn"])
BETA = dict(dial="beta", strengths=(0.3, 0.1, 1.0, 3.0), n=2, proposal="prior")
BEST = dict(dial="n", strengths=(8, 2, 4, 16), proposal="prior")
METHODS = {
    "BRAIn": Method(family),
    "offline BRAIn": Method(family, proposal="prior"),
    "none": Method(functools.partial(family, baseline="none")),
    "unnormalized": Method(functools.partial(family, baseline="unnormalized")),
    "reverse": Method(functools.partial(family, divergence="reverse")),
    "log_variance": Method(functools.partial(family, divergence="log_variance")),
    "RLOO": Method(rloo, refresh=1),
    "PPO": Method(ppo),
    "GRPO": Method(grpo),
    "DPO": Method(peoples_dpo, judge="people", **BETA),
    "DPO-sft": Method(dpo, **BETA),
    "SLiC-HF": Method(slic, **BETA | dict(dial="margin")),
    "RRHF": Method(rrhf, **BEST),
    "best of n": Method(best_of_n, **BEST),
}
MAIN = [*METHODS]
TRUE = {f"{name}, truth": METHODS[name]._replace(judge="truth", against="BRAIn, truth")
        for name in ("BRAIn", "RLOO", "PPO", "DPO-sft")}
VARIED = {f"{name}, {dial} {value}": METHODS[name]._replace(
              **{dial: value}, strengths=(0.4,), against=name)
          for dial, names, values in (("n", ("BRAIn", "RLOO", "log_variance"), (2, 4, 16)),
                                      ("refresh", ("BRAIn", "PPO", "log_variance"), (1, 16)))
          for name in names for value in values}
METHODS |= TRUE | VARIED
LEVELS = (0.25, 0.5, 0.75, 1.0)  # nats of KL to the prior
JUDGES = ("learned", "truth")
PARTS = ("quarter", "half", "all")  # of a run, after which it is measured
Job = collections.namedtuple("Job", "method strength lr seed")

@dataclass
class Plan:
    """Flags of the contest; it keeps a file a run, so that a killed sweep goes on."""

    out: str = "out/compare"
    seeds: int = 10  # 5 at most for what varies n or the steps of a refresh
    methods: list[str] = field(default_factory=lambda: [*METHODS])
    jobs: int = 2  # processes, of one thread each
    tuning: list[int] = field(default_factory=lambda: [100, 101, 102])  # seeds that set the rates
    rate: float = 2e-3  # the first that is tried
    steps: int = 100  # of a run, its rate falling to 0
    samples: int = 128  # of a step
    prompts: int = 16  # held-out prompts of the figures
    toy: str = "--eval_prompts=3 --steps=1"  # flags of brain.py for a seed's prior and reward model

def list_space(size, longest):
    """All responses in ids: an end (0) after 0, 1, … words, then those of full length."""
    words = [[*itertools.product(range(1, size), repeat=k)] for k in range(longest + 1)]
    return [[*y, 0] for y in itertools.chain(*words[:-1])] + [[*y] for y in words[-1]]

@torch.no_grad()
def exact_log_prob(model, prompts, longest):
    """log q of `list_space` after prompts of one length, (P, |Y|): prefixes grow by a token."""
    size, cache = model.config.vocab_size, transformers.DynamicCache()
    tokens, prefix, parts = torch.tensor(prompts), torch.zeros(len(prompts), 1), []
    for k in range(longest):
        if k:
            cache.batch_repeat_interleave(size - 1)
            tokens = torch.arange(1, size).repeat(prefix.numel() // (size - 1))[:, None]
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].float()
        following = prefix[..., None] + logits.log_softmax(-1).view(*prefix.shape, size)
        parts.append(following[..., 0])  # ended
        prefix = following[..., 1:].flatten(1)  # (P, (size − 1)^(k + 1))
    return torch.cat([*parts, prefix], -1).double()

def true_rewards(prompts, responses, references=None):
    """Twice the generator's worth of each response, 2·(distinct key words listed) − (words), as its
    judge prefers one of two with probability σ(2Δworth)."""
    pairs = [(x.split(), y.split()) for x, y in zip(prompts, responses, strict=True)]
    return [2 * (2 * len({*brain.KEYS}.intersection(x, y)) - len(y)) for x, y in pairs]

def win_share(values, weight):
    """The probability that each value (|Y|,) beats one drawn by weight, ties counting half."""
    levels, index = values.unique(return_inverse=True)
    mass = torch.zeros(len(levels)).double().index_add(0, index, weight)
    return (mass.cumsum(0) - mass / 2)[index]

def list_responses(run, prior, examples):
    """All responses to some prompts, (P, |Y|) each: log p, both rewards less the penalty, the true
    worth, and who wins against a sample of the prior."""
    prompts = [brain.encode_prompt(run.tokenizer, example.prompt) for example in examples]
    R, size = run.cfg.max_response_tokens, len(run.tokenizer)
    space = list_space(size, R)
    batches = brain.split_batches(run, [(example, space) for example in examples])
    for batch in batches:
        brain.judge(run, batch)

    texts = [brain.response_text(run.tokenizer, y, run.ends) for y in space]
    truth = [true_rewards([example.prompt] * len(space), texts) for example in examples]
    truth, log_prior = torch.tensor(truth).double(), exact_log_prob(prior, prompts, R)
    penalty = run.cfg.missing_eos_penalty * torch.tensor([y[-1] != 0 for y in space])
    return dict(prompts=prompts, log_prior=log_prior, worth=truth / 2, truth=truth - penalty,
                learned=torch.cat([batch.reward for batch in batches]).double(),
                wins=torch.stack([*map(win_share, truth, log_prior.exp())]))

def measure(known, judge, kl_coef, log_policy=None):
    """Exact figures of a policy (P, |Y|) or of the posterior itself, means over the prompts. What
    the policy lacks of the objective's optimum, J* − J, is kl_coef·KL(policy ‖ posterior)."""
    log_posterior = (known["log_prior"] + known[judge] / kl_coef).log_softmax(-1)
    log_policy = log_posterior if log_policy is None else log_policy
    values = dict(reward=known[judge], worth=known["worth"], wins=known["wins"],
                  kl=log_policy - known["log_prior"], lacks=kl_coef * (log_policy - log_posterior))
    values["objective"] = known[judge] - kl_coef * values["kl"]
    found = {name: (log_policy.exp() * x).sum(-1).mean().item() for name, x in values.items()}
    forward = log_posterior.exp() * (log_posterior - log_policy)
    return found | {"forward": forward.sum(-1).mean().item()}

def posterior_at(known, judge, kl):
    """The figures of the posterior at a KL to the prior, by bisection in its kl_coef."""
    low, high = 1e-3, 1e3
    for _ in range(40):
        kl_coef = math.sqrt(low * high)
        found = measure(known, judge, kl_coef)
        low, high = (kl_coef, high) if found["kl"] > kl else (low, kl_coef)
    return found

def open_run(folder, out, *flags):
    """brain.py before stage 3, on a seed's prior and reward model: run, prior, train, test."""
    run = brain.Run(brain.parse_config([f"--prior={folder}/prior", f"--reward={folder}/reward",
                                        f"--out={out}", "--device=cpu", *flags]))
    return run, *brain.prepare(run)

def write_whole(path, write):
    """A file that is there whole or not at all."""
    write(path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)

def share_seed(plan, seed):
    """Trains a seed's prior and reward model, and lists all responses; the posterior's figures at
    each of LEVELS, for either judge."""
    folder = Path(plan.out, f"seed{seed}")
    if not (folder / "known.pt").exists():
        with mock.patch.object(brain, "exact_kl", return_value={}):  # saves time
            ran = run_main([f"--seed={seed}", f"--out={folder}", "--device=cpu", *plan.toy.split()])
        assert ran.status == 0, ran.stderr
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
            run, prior, _, test = open_run(folder, out, f"--seed={seed}")
            known = list_responses(run, prior, test[: plan.prompts])
        write_whole(folder / "known.pt", functools.partial(torch.save, known))
    known = torch.load(folder / "known.pt")
    return {judge: [posterior_at(known, judge, kl) for kl in LEVELS]
            for judge in JUDGES}

@torch.no_grad()
def own_pairs(run, proposal, examples, n, *key):
    """In the place of brain.sample_rollouts: the task's chosen and rejected responses."""
    limit = run.cfg.max_comparison_tokens
    found = brain.encode_answers(run, examples, ("chosen", "rejected"), limit)
    prompts = [brain.encode_prompt(run.tokenizer, example.prompt) for example in examples]
    log_q = brain.sequence_log_prob(proposal, brain.pack(prompts, [ids for _, ids in found]))
    return [(*row, sampled) for row, sampled in zip(found, log_q, strict=True)]

def train(plan, job, prompts, look):
    """brain.train_policy with the job's loss; look(log_policy) of prompts after each of PARTS."""
    method, folder = METHODS[job.method], Path(plan.out, f"seed{job.seed}")
    n = int(job.strength) if method.dial == "n" else method.n
    size, update = plan.samples // n, brain.Stage.update

    def policy_loss(run, policy, batch):
        samples = Samples(brain.log_prob(run, policy, batch), batch.log_prior, batch.log_proposal,
                          batch.reward, batch.length)
        return method.loss(samples, job.strength), {}

    def watched_update(stage, *args):
        update(stage, *args)
        if stage.step + 1 in (plan.steps // 4, plan.steps // 2, plan.steps):
            look(exact_log_prob(stage.model, prompts, stage.run.cfg.max_response_tokens))

    with tempfile.TemporaryDirectory() as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain.Stage, "update", watched_update)
        patch.setattr(brain, "policy_loss", policy_loss)
        if method.judge == "people":
            patch.setattr(brain, "sample_rollouts", own_pairs)
        run, prior, examples, _ = open_run(
            folder, out, f"--seed={job.seed}", f"--steps={plan.steps}", f"--lr={job.lr}",
            f"--samples_per_prompt={n}", f"--proposal={method.proposal}",
            f"--prompts_per_step={size}", f"--prompts_per_refresh={method.refresh * size}")
        if method.judge == "truth":
            run.reward = functools.partial(brain.judge_texts, Path(__file__), true_rewards, run)
        brain.train_policy(run, prior, copy.deepcopy(prior).float(), examples)

def run_job(plan, job):
    """The record of a run, made if it is not there: its course, what its end is above the posterior
    of equal KL, and what a guard said that stopped it, without figures."""
    path, began, course = Path(plan.out, "{}-{:g}-{:g}-{}.json".format(*job)), time.time(), []
    if path.exists():
        return json.loads(path.read_text())
    known = torch.load(Path(plan.out, f"seed{job.seed}", "known.pt"))
    judge = "truth" if METHODS[job.method].judge == "truth" else "learned"
    kl_coef = job.strength if METHODS[job.method].dial == "kl_coef" else 0.4
    record = dict(course=course, above={}, said="")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(plan, job, known["prompts"],
                  lambda log_q: course.append(measure(known, judge, kl_coef, log_q)))
        best = posterior_at(known, judge, course[-1]["kl"])
        record["above"] = {key: course[-1][key] - best[key] for key in ("reward", "worth", "wins")}
    except brain.Guard as guard:
        record["said"], record["course"] = str(guard), [{"objective": -math.inf}]

    record["seconds"] = time.time() - began
    write_whole(path, lambda part: part.write_text(json.dumps(record)))
    return record

def in_parallel(plan, work, items):
    """{item: work(plan, item)}, in processes of one thread each."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        found = (pool.map if plan.jobs > 1 else map)(functools.partial(work, plan), items)
        return dict(zip(items, tqdm(found, work.__name__, len(items)), strict=True))

def at_level(records, level, key):
    """What a method's runs have above the posterior at a KL to the prior, linear between their
    strengths and 0 at the prior; NaN beyond the last, and for a single strength."""
    points = [(record["course"][-1]["kl"], record["above"][key])
              for record in records if not record["said"]]
    for (low, a), (high, b) in itertools.pairwise(sorted([(0.0, 0.0), *points])):
        if low < level <= high and len(points) > 1:
            return a + (level - low) / (high - low) * (b - a)
    return math.nan

def figures_of(name, runs):
    """Each figure of a method by its column, a list over seeds, from runs[seed][strength]."""
    found, fine = {}, METHODS[name].dial == "kl_coef"  # it has this objective
    fine = fine and not any(records[0]["said"] for records in runs)
    for (place, part), key in itertools.product(enumerate(PARTS), ("lacks", "forward")):
        found[f"{key}, {part}"] = [records[0]["course"][place][key] if fine else math.nan
                                   for records in runs]
    for key, kl in itertools.product(("reward", "worth", "wins"), LEVELS):
        found[f"{key} at {kl}"] = [at_level(records, kl, key) for records in runs]
    return found

def flip_test(differences):
    """p of a mean this far from 0, over all signs of the seeds' differences: exact; 1 for NaN."""
    signs = torch.tensor([*itertools.product((-1.0, 1.0), repeat=len(differences))]).double()
    means = (signs @ torch.tensor(differences).double()).abs()
    return 1 - (means < means[-1] - 1e-12).double().mean().item()

def cell(values):
    """Mean ± standard error over the seeds; – where a seed has no figure."""
    found = torch.tensor(values).double()
    error = found.std() / math.sqrt(len(values))
    return f"{found.mean():.3f} ± {error:.3f}" if error.isfinite() else "–"

def print_contest(title, figures, names, kinds, primary):
    """A table, a row a method: columns of some kinds, and the primary one of the method that it is
    held to, BRAIn or its own plain form, less its own."""
    names = [name for name in names if name in figures]
    columns = [column for column in figures[names[-1]] if column.startswith(kinds)]
    print(f"\n{title}\n")
    table("method", *columns, f"{primary}: held to, less it", "p", head=True)
    for name in names:
        own = figures[name]
        other = figures.get(METHODS[name].against if name in METHODS else name, own)
        gap = [*map(operator.sub, other[primary], own[primary])]  # of the seeds that both have
        table(name, *(cell(own[column]) for column in columns), cell(gap), flip_test(gap))

def tune(plan):
    """{method: {rate: E[r] − 0.4·KL, the mean over seeds}}: half and twice the best rate are tried
    until it stands between two others."""
    means, todo = {name: {} for name in plan.methods}, [(name, plan.rate) for name in plan.methods]
    while todo:
        jobs = [Job(name, METHODS[name].strengths[0], lr, seed)
                for name, lr in todo for seed in plan.tuning]
        ends = [record["course"][-1]["objective"]
                for record in in_parallel(plan, run_job, jobs).values()]
        for i, (name, lr) in enumerate(todo):
            means[name][lr] = statistics.fmean(ends[i * len(plan.tuning) :][: len(plan.tuning)])
        best = {name: max(found, key=found.get) for name, found in means.items()}
        todo = [(name, lr * factor) for name, lr in best.items() for factor in (1 / 2, 2)
                if lr * factor not in means[name]]
    return means

def compare(argv):
    """Tunes each method's rate, runs its strengths on fresh seeds, prints the tables."""
    plan, = transformers.HfArgumentParser(Plan).parse_args_into_dataclasses(argv)
    posteriors = in_parallel(plan, share_seed, [*{*plan.tuning, *range(plan.seeds)}])
    means = tune(plan)
    rates = {name: max(found, key=found.get) for name, found in means.items()}
    seeds = {name: min(plan.seeds, 5 if name in VARIED else 99) for name in plan.methods}
    jobs = [Job(name, strength, rates[name], seed) for name in plan.methods
            for seed in range(seeds[name]) for strength in METHODS[name].strengths]
    found, runs = in_parallel(plan, run_job, jobs), collections.defaultdict(list)
    for (name, _), group in itertools.groupby(jobs, lambda job: (job.method, job.seed)):
        runs[name].append([found[job] for job in group])
    figures = {name: figures_of(name, records) for name, records in runs.items()}
    for judge, kl, key in itertools.product(JUDGES, LEVELS, ("worth", "wins")):
        own = [posteriors[seed][judge][LEVELS.index(kl)][key] for seed in range(plan.seeds)]
        figures.setdefault(f"the posterior, {judge}", {})[f"{key} at {kl}"] = own

    print_contest("(a) J* − J at kl_coef 0.4 after a quarter, half and all of the samples, and "
                  "KL(posterior ‖ policy); (b) learned reward less the posterior's at equal KL",
                  figures, MAIN, ("lacks", "forward, half", "forward, all", "reward"),
                  "lacks, half")
    print_contest("(c) true worth and win rate, less the posterior's at equal KL but in its rows",
                  figures, ["the posterior, learned", "the posterior, truth", *MAIN, *TRUE],
                  ("worth", "wins"), "wins at 0.5")
    print_contest("J* − J over n and the steps of a refresh", figures, [*MAIN, *VARIED], "lacks",
                  "lacks, half")
    print("\nThe tuned rates, and E[r] − 0.4·KL there and at half and twice the rate\n")
    table("method", "rate", "there", "half", "twice", head=True)
    for name, lr in rates.items():
        table(name, lr, *(means[name][lr * factor] for factor in (1, 1 / 2, 2)))

SHORT_CONTEST = [
    "--methods", "BRAIn, n 4", "DPO", "--tuning=0", "--seeds=2", "--jobs=1",
    "--steps=8", "--samples=16", "--prompts=1", "--toy=--eval_prompts=3 --steps=1 --sft_epochs=1 "
    "--sft_batch=512 --reward_epochs=1 --reward_batch=512"]

def run_contest(flags):
    """What a contest prints whose rates are tuned already."""
    tuned = {name: {lr: -abs(lr - 2e-3) for lr in (1e-3, 2e-3, 4e-3)} for name in METHODS}
    with mock.patch.object(sys.modules[__name__], "tune", return_value=tuned), \
            contextlib.redirect_stdout(io.StringIO()) as said:
        compare(flags)
    return said.getvalue()

@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """A contest in small: its flags, its plan, what it printed."""
    flags = [*SHORT_CONTEST, f"--out={tmp_path_factory.mktemp('contest')}"]
    said = run_contest(flags)
    plan, = transformers.HfArgumentParser(Plan).parse_args_into_dataclasses(flags)
    return flags, plan, said

def test_contest_goes_on(contest, monkeypatch):
    """Catches a contest that does its runs twice or prints other figures from their records, and a
    run that a guard stops and that takes the others along."""
    flags, plan, said = contest
    monkeypatch.setattr(brain, "train_policy", None)
    assert run_contest(flags) == said and "| DPO | – |" in said

    path, = Path(plan.out).glob("BRAIn, n 4-*-1.json")
    kept = path.rename(path.with_suffix(".kept"))
    monkeypatch.setattr(brain, "train_policy", mock.Mock(side_effect=brain.Guard("NaN")))
    assert "| BRAIn, n 4 | – | – | – | – | 1 |" in run_contest(flags)
    assert json.loads(path.read_text())["said"] == "NaN"
    kept.rename(path)

def test_contest_changes_the_loss_alone(contest, tmp_path):
    """Catches a harness that changes more than the loss: with BRAIn's own the course ends where a
    run of brain.py's ends. Catches a truth that is not measured as it is rewarded, pairs that are
    not the task's or not in order, a list of responses that is not complete."""
    _, plan, _ = contest
    folder, job = Path(plan.out, "seed1"), Job("BRAIn", 0.4, 2e-3, 1)
    known = torch.load(folder / "known.pt")
    with contextlib.redirect_stdout(io.StringIO()):
        run, prior, examples, test = open_run(
            folder, tmp_path, "--seed=1", "--steps=8", "--samples_per_prompt=8", "--lr=2e-3",
            "--prompts_per_step=2", "--prompts_per_refresh=8", "--kl_coef=0.4")
        policy = copy.deepcopy(prior).float()
        brain.train_policy(run, prior, policy, examples)
    end = measure(known, "learned", 0.4, exact_log_prob(policy, known["prompts"], 4))
    assert run_job(plan, job)["course"][-1] == end

    run.reward = functools.partial(brain.judge_texts, Path(__file__), true_rewards, run)
    batch, = brain.split_batches(run, [(test[0], list_space(10, 4)[::50])])
    brain.judge(run, batch)
    assert torch.equal(batch.reward, known["truth"][:, ::50])

    (_, ids, log_sampled), = own_pairs(run, policy, examples[-1:], 2)
    words = [[*text.split(), "<eos>"][:4] for text in examples[-1][2:]]
    assert [run.tokenizer.convert_ids_to_tokens(y) for y in ids] == words
    space, prompt = list_space(10, 4), run.tokenizer(examples[-1].prompt).input_ids
    log_q = exact_log_prob(policy, [prompt], 4)[0]
    found = torch.stack([log_q[space.index(y)] for y in ids] + [log_q.logsumexp(-1)])
    assert found.tolist() == pytest.approx([*log_sampled.tolist(), 0], abs=1e-5)

def test_contest_tunes_until_a_rate_stands_between_two(monkeypatch):
    """Catches a rate at the end of those that were tried, and seeds that are not averaged."""
    plan = Plan(methods=["BRAIn", "DPO"], tuning=[1, 5], jobs=1)
    best = {"BRAIn": 5e-4, "DPO": 8e-3}

    def run(plan, job):
        return {"course": [{"objective": -abs(math.log2(job.lr / best[job.method])) - job.seed}]}

    monkeypatch.setattr(sys.modules[__name__], "run_job", run)
    assert tune(plan) == {
        "BRAIn": {2e-3: -5, 1e-3: -4, 4e-3: -6, 5e-4: -3, 2.5e-4: -4},
        "DPO": {2e-3: -5, 1e-3: -6, 4e-3: -4, 8e-3: -3, 16e-3: -4}}

def test_contest_by_hand():
    """Catches a figure that is not what its name says, of three responses; a wrong interpolation
    or p; a truth that is not the generator's; pairs of which the second was chosen."""
    weight, worth = torch.tensor([[2, 1, 1], [0, 2, 1]]).double() / torch.tensor([[4], [1]])
    known = dict(log_prior=weight.log()[None], learned=torch.tensor([[0, 1, 1]]).double(),
                 worth=worth[None], wins=win_share(worth, weight)[None])
    assert known["wins"].tolist() == [[0.25, 0.875, 0.625]]
    assert win_share(known["learned"][0], weight).tolist() == [0.25, 0.75, 0.75]
    policy, z = [0.25, 0.5, 0.25], 2 + 2 * math.exp(2)
    posterior = [2 / z, math.exp(2) / z, math.exp(2) / z]  # p·exp(r/0.5) over its sum
    back, forward = (sum(a * math.log(a / b) for a, b in zip(*pair, strict=True))
                     for pair in ((policy, posterior), (posterior, policy)))
    want = dict(reward=0.75, worth=1.25, wins=0.65625, kl=math.log(2) / 4, lacks=back / 2,
                forward=forward, objective=0.75 - math.log(2) / 8)
    assert measure(known, "learned", 0.5, torch.tensor([policy]).log()) == pytest.approx(want)
    own = measure(known, "learned", 0.5)
    assert posterior_at(known, "learned", own["kl"]) == pytest.approx(own)

    ends = [dict(course=[{"kl": kl}], above={"wins": kl**2}, said="") for kl in (0.8, 0.4)]
    found = [at_level(ends, kl, "wins") for kl in (0.2, 0.5, 0.8)]
    assert found == pytest.approx([0.08, 0.28, 0.64])
    assert math.isnan(at_level(ends, 0.9, "wins")) and math.isnan(at_level(ends[:1], 0.2, "wins"))
    assert [flip_test(row) for row in ([1, 2, 3], [1, 2, -3])] == [0.25, 1]
    assert cell([1.0, 2.0, 3.0]) == "2.000 ± 0.577"
    pair, zero = torch.tensor([[-1.0, -3.0]]), torch.zeros(1, 2)
    assert peoples_dpo(Samples(pair, *[zero] * 4), 1.0) == pytest.approx([math.log1p(math.exp(-2))])
    assert true_rewards(["the sun of moon a in TL;DR:"], ["sun sun star moon"]) == [2 * (2 * 2 - 4)]

PROGRAMS = {"bench": benchmark, "compare": compare, "capitals": write_capitals}
if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in PROGRAMS:
        sys.exit(f"python test_brain.py {'|'.join(PROGRAMS)} [--help]; the tests: make test")
    transformers.logging.disable_progress_bar()
    PROGRAMS[sys.argv[1]](sys.argv[2:])
