import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import check_model, fresh
from skillbank.models.diffusion import Denoiser, DiffusionPolicy, Mish, betas
from tests.tiny import close, tiny_batch, tiny_policy


@pytest.mark.parametrize(
    ("observation", "action", "time_dim", "hidden", "rank", "parameters", "lora"),
    [(24, 6, 64, (128, 128), 8, 1_645_350, 70_432), (17, 6, 128, (256, 256), 8, 1_750_342, 74_984), (7, 2, 64, (128, 128), 16, 1_638_946, 140_464)],
)
def test_parameter_counts_of_the_paper(observation, action, time_dim, hidden, rank, parameters, lora):
    policy = DiffusionPolicy(observation, action, time_dim=time_dim, time_hidden=hidden)
    assert sum(p.numel() for p in policy.parameters()) == parameters
    assert sum(p.numel() for p in fresh(policy.net, rank=rank)) == lora


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("vp", [0.1959, 0.4588, 0.6358, 0.7549, 0.8350]), ("cosine", [0.1013, 0.2795, 0.4736, 0.7241, 0.999])],
)
def test_schedules_are_the_given_arrays(schedule, expected):
    torch.testing.assert_close(betas(schedule, 5), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)


def test_vp_keeps_the_given_share():
    kept = (1 - betas("vp", 5)).cumprod(0)
    torch.testing.assert_close(kept, torch.tensor([0.80413, 0.43518, 0.15850, 0.03885, 0.00641], dtype=torch.float64), rtol=0, atol=5e-6)


@given(st.sampled_from(["vp", "cosine", "linear"]), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_every_schedule_destroys_the_signal_step_by_step(schedule, steps):
    beta = betas(schedule, steps)
    assert beta.shape == (steps,)
    assert ((beta > 0) & (beta < 1)).all()
    kept = (1 - beta).cumprod(0)
    assert (kept.diff() < 0).all()


@pytest.mark.parametrize(("schedule", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
@pytest.mark.parametrize("steps", [5, 100])
def test_schedules_equal_diffusers(schedule, theirs, steps):
    from diffusers import DDPMScheduler

    oracle = DDPMScheduler(num_train_timesteps=steps, beta_schedule=theirs)
    torch.testing.assert_close(betas(schedule, steps).float(), oracle.betas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["vp", "cosine", "linear"])
def test_a_denoise_step_equals_diffusers(schedule):
    from diffusers import DDPMScheduler

    policy = tiny_policy(schedule=schedule)
    oracle = DDPMScheduler(num_train_timesteps=5, trained_betas=betas(schedule, 5).float().numpy(), variance_type="fixed_large", clip_sample=False)
    noise = torch.randn(4, 3)
    action, t = torch.rand(4, 3) * 2 - 1, torch.tensor([0, 1, 3, 4])
    close(policy.noised(action, noise, t), oracle.add_noise(action, noise, t), 1e-6)
    x = torch.randn(4, 3) * 0.1
    start = x.clone()
    torch.manual_seed(5)
    ours = policy.denoise(lambda y, step: 0.1 * y, 4, x, 1.0)
    torch.manual_seed(5)
    x = torch.empty_like(start).normal_()
    for step in reversed(range(5)):
        draw = torch.random.get_rng_state()
        mean = oracle.step(0.1 * x, step, x, generator=torch.Generator().manual_seed(0)).prev_sample
        if step:
            variance = oracle._get_variance(step) ** 0.5
            own = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
            torch.random.set_rng_state(draw)
            mean = mean - variance * own + variance * torch.randn(4, 3)
        x = mean.clamp(-1, 1)
    close(ours[:, 0], x, 1e-5)


@torch.no_grad()
def test_the_true_noise_leads_back_to_the_action():
    policy = tiny_policy()
    action, noise = torch.rand(8, 3) * 1.8 - 0.9, torch.randn(8, 3)
    t = torch.zeros(8, dtype=torch.long)
    x = policy.noised(action, noise, t)
    beta, kept = policy.beta[0], policy.kept[0]
    close((x - beta / (1 - kept).sqrt() * noise) / (1 - beta).sqrt(), action, 1e-5)
    oracle = lambda y, step: (y - policy.kept[step].sqrt() * action) / (1 - policy.kept[step]).sqrt()  # noqa: E731
    close(policy.denoise(oracle, 8, action, 0.0)[:, 0], action, 1e-5)


@torch.no_grad()
def test_the_time_features_read_the_raw_step():
    net = Denoiser(5, 3, time_dim=8, time_hidden=(8, 8))
    fourier = net.time[0]
    angle = 2 * torch.pi * 3 * fourier.frequencies[:, 0]
    torch.testing.assert_close(fourier(torch.tensor([[3.0]]))[0], torch.cat([angle.cos(), angle.sin()]))
    assert Denoiser(5, 3, time_dim=20_000).time[0].frequencies.std() == pytest.approx(0.2, rel=0.05)


@torch.no_grad()
def test_block_layers_start_as_lecun_normal():
    layer = Denoiser(5, 3).blocks[0].reduce
    assert layer.weight.std() == pytest.approx(1024**-0.5, rel=0.01)
    assert layer.weight.abs().max() <= 2 * 1024**-0.5 / 0.8796
    assert torch.equal(layer.bias, torch.zeros(256))


def test_fresh_noise_every_step(policy, batch):
    assert policy(batch) != policy(batch)


def test_the_weight_of_an_example_scales_its_loss(policy, batch):
    torch.manual_seed(0)
    plain = policy(batch)
    torch.manual_seed(0)
    close(policy({**batch, "weight": torch.full((6,), 3.0)}), 3 * plain)


@pytest.mark.parametrize("horizon", [1, 4])
def test_the_contract_with_any_horizon(horizon):
    policy = tiny_policy(horizon=horizon)
    check_model(policy, tiny_batch(horizon=horizon))
    actions = policy.predict(tiny_batch())
    assert actions.shape == (6, horizon, 3)
    assert actions.abs().max() <= 1


def test_temperature_zero_is_deterministic():
    policy = tiny_policy(temperature=0.0)
    first = policy.predict(tiny_batch())
    assert torch.equal(first, policy.predict(tiny_batch()))
    assert not torch.equal(tiny_policy().predict(tiny_batch()), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mish_is_torchs(dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-2}[dtype]
    mine, theirs = (torch.linspace(-60, 60, 4001, dtype=dtype, requires_grad=True) for _ in range(2))
    out, expected = Mish()(mine), torch.nn.functional.mish(theirs)
    for each in (out, expected):
        each.sum().backward()
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    (slope,) = torch.autograd.grad(Mish()(mine).square().sum(), mine, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def test_one_activation_everywhere():
    policy = tiny_policy(activation="SiLU")
    kinds = {type(m).__name__ for m in policy.net.modules()}
    assert "SiLU" in kinds
    assert "Mish" not in kinds


def test_a_wrong_model_fails_the_contract():
    policy = tiny_policy()
    with pytest.raises(TypeError, match=r"Linear is not a Model: .* missing \['net', 'context', 'predict'\]"):
        check_model(torch.nn.Linear(2, 2), tiny_batch())
    with pytest.raises(ValueError, match=r"dimension 0, got {'observation': 6, 'action': 2}"):
        check_model(policy, {**tiny_batch(), "action": torch.zeros(2, 1, 3)})
    policy.context = lambda batch: batch["observation"][:2]
    with pytest.raises(ValueError, match=r"context must be \(B, D\) or \(B, T, D\) with B=6, got \(2, 5\)"):
        check_model(policy, tiny_batch())
    policy.context = lambda batch: batch["observation"] * torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="context must carry no gradient"):
        check_model(policy, tiny_batch())


def test_errors_name_the_sizes(policy):
    with pytest.raises(ValueError, match=r"reads observations \(B, 5\), got \(2, 4\)"):
        policy.predict({"observation": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match=r"trains on actions \(B, 1, 3\), got \(6, 2, 3\)"):
        policy(tiny_batch(horizon=2))
    with pytest.raises(ValueError, match="unknown schedule 'sigmoid'"):
        betas("sigmoid", 5)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        betas("vp", 0)
