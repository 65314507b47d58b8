"""Editing on fields whose flows are known."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.flow.edit_methods import (
    EDITS,
    EditRun,
    FlowEdit,
    Inversion,
    SDEdit,
    make_edit,
)
from janusflow.flow.editing import (
    Inpainting,
    edit_times,
    flow_edit,
    invert,
    latent_mask,
    reconstruction_error,
    regenerate,
    start_of_edit,
)
from janusflow.flow.path import interpolate
from janusflow.flow.solvers import solve
from janusflow.flow.timesteps import time_grid


def gaussian(x, t):
    """The velocity between noise and N(1.5, 0.5²): its flow ends at 1.5 + x_0 / 2."""
    variance = (1 - t) ** 2 + (t * 0.5) ** 2
    return 1.5 + (t * 0.25 - (1 - t)) / variance * (x - t * 1.5)


def towards(image):
    """The velocity of straight paths that all end at one image."""
    return lambda x, t: (image - x) / (1 - t)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def x_img() -> torch.Tensor:
    return 1.5 + 0.5 * torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(2))


def test_an_edit_starts_on_the_path_between_noise_and_picture(x_img, noise):
    x, t0 = start_of_edit(x_img, noise, 0.3)
    assert t0 == 0.7
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, 0.7 * x_img + 0.3 * noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_full_strength_is_plain_sampling(x_img, noise, shift):
    x, t0 = start_of_edit(x_img, noise, 1.0)
    times = edit_times(10, 1, shift=shift)
    assert t0 == 0.0
    assert torch.equal(x, noise)
    assert torch.equal(times, time_grid(10, shift=shift))


def test_little_strength_gives_nearly_the_picture(x_img, noise):
    errors = []
    for strength in (0.01, 0.5):
        x, _ = start_of_edit(x_img, noise, strength)
        x = solve(gaussian, x, edit_times(20, strength)).latents
        errors.append(reconstruction_error(x_img, x).max().item())
    assert 0 < errors[0] < 0.02 < 0.1 < errors[1]


def test_an_edit_takes_its_share_of_the_steps_from_exactly_its_strength():
    torch.testing.assert_close(edit_times(10, 0.3), time_grid(10)[-4:], atol=1e-15, rtol=0)
    torch.testing.assert_close(
        edit_times(10, 0.36), torch.tensor([0.64, 0.76, 0.88, 1.0]).double(), atol=1e-7, rtol=0
    )
    assert len(edit_times(100, 0.29)) == 30  # 100 · 0.29 is below 29 in binary
    assert edit_times(10, 0.01).tolist() == [0.99, 1.0]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_every_edit_begins_at_its_strength_and_ends_at_one(shift):
    for strength in torch.rand(500, generator=torch.Generator().manual_seed(0)).double().tolist():
        times = edit_times(30, 1 - strength, shift=shift)
        assert times[0] == 1 - (1 - strength)
        assert times[-1] == 1
        assert (times.diff() > 0).all()


def test_a_shift_spaces_the_rest_as_it_spaces_the_whole():
    shift = 3.0
    t = edit_times(20, 0.4, shift=shift)
    before = shift * t / (1 + (shift - 1) * t)  # undoes the shift
    torch.testing.assert_close(before.diff(), before.diff().mean().expand(8))


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), True, "half"])
def test_a_strength_out_of_range_is_refused(strength, x_img, noise):
    with pytest.raises(SettingsError, match="strength must be above 0 and at most 1"):
        edit_times(10, strength)
    with pytest.raises(SettingsError, match="strength must be above 0 and at most 1"):
        start_of_edit(x_img, noise, strength)


def test_times_of_an_edit_are_checked_as_those_of_sampling():
    with pytest.raises(SettingsError, match="num_inference_steps"):
        edit_times(2.5, 0.5)
    with pytest.raises(SettingsError, match=r"shift must be .* got -1"):
        edit_times(10, 0.5, shift=-1)


def test_noise_of_another_shape_is_refused(x_img, noise):
    wrong, expected = noise[:1], r"\(1, 2, 4, 6\); expected \(3, 2, 4, 6\)"
    with pytest.raises(SettingsError, match=f"noise has shape {expected}"):
        start_of_edit(x_img, wrong, 0.5)
    with pytest.raises(SettingsError, match=f"noise has shape {expected}"):
        Inpainting(x_img, wrong, torch.ones(1, 1, 4, 6, dtype=torch.bool))
    with pytest.raises(SettingsError, match=f"noise has shape {expected}"):
        invert(gaussian, x_img, time_grid(2), noise=wrong)
    with pytest.raises(SettingsError, match=f"x_0 has shape {expected}"):
        regenerate(gaussian, wrong, x_img, time_grid(2))


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    mask[..., 1:3, 2:5] = True
    return mask


def test_inpainting_keeps_the_known_part_bit_by_bit_and_draws_the_rest(x_img, noise, mask):
    inpainting, times = Inpainting(x_img, noise, mask), time_grid(7)
    found = solve(gaussian, noise, times, on_step=inpainting, return_trajectory=True)
    kept = ~mask.expand_as(x_img)
    assert torch.equal(found.latents[kept], x_img[kept])
    assert ((found.latents - x_img)[~kept].abs() > 1e-6).all()
    for t, x in zip(times[1:], found.trajectory[1:], strict=True):
        torch.testing.assert_close(x[kept], ((1 - t) * noise + t * x_img)[kept])
    plain = solve(gaussian, noise, times).latents  # cells of this field do not see each other
    assert torch.equal(found.latents[~kept], plain[~kept])


def test_what_is_drawn_sees_what_is_known(x_img, noise, mask):
    def mixing(x, t):
        return gaussian(x, t) + x.mean((-2, -1), keepdim=True)

    kept = [
        solve(mixing, noise, time_grid(5), on_step=Inpainting(image, noise, mask)).latents
        for image in (x_img, x_img + 1)
    ]
    assert (kept[0] - kept[1])[mask.expand_as(x_img)].abs().min() > 1e-3


def test_each_picture_may_have_its_own_mask(x_img, noise, mask):
    masks = torch.cat([mask, ~mask, torch.zeros_like(mask)])
    found = solve(gaussian, noise, time_grid(3), on_step=Inpainting(x_img, noise, masks)).latents
    assert torch.equal(found == x_img, ~masks.expand_as(x_img))


def test_a_mask_that_does_not_fit_is_refused(x_img, noise, mask):
    with pytest.raises(SettingsError, match=r"torch.float32 .*latent_mask"):
        Inpainting(x_img, noise, mask.float())
    for wrong in (mask[..., 1:], mask.expand(2, 1, 4, 6), mask[0], mask.expand(1, 2, 4, 6)):
        with pytest.raises(SettingsError, match=r"expected torch.bool of shape \(3, 1, 4, 6\) or"):
            Inpainting(x_img, noise, wrong)


def test_one_masked_pixel_draws_its_cell():
    pixels = torch.zeros(2, 1, 32, 48)
    pixels[0, 0, 8, 47] = 0.5
    pixels[1, 0, 7, 8] = 1.0
    pixels[1, 0, 31, 0] = 0.4
    found = latent_mask(pixels, (4, 6))
    assert found.dtype == torch.bool
    assert found.nonzero().tolist() == [[0, 0, 1, 5], [1, 0, 0, 1]]
    assert torch.equal(latent_mask(pixels >= 0.5, (4, 6)), found)
    with pytest.raises(SettingsError, match=r"\(32, 48\); expected \(B, 1, H, W\)"):
        latent_mask(pixels[0, 0], (4, 6))


def test_a_pixel_on_the_border_of_two_cells_draws_both():
    pixels = torch.zeros(1, 1, 3, 3)
    pixels[..., 1, 0] = 1
    assert latent_mask(pixels, (2, 2)).nonzero()[:, 2:].tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_edit_between_equal_prompts_changes_nothing(x_img, dtype):
    def steep(x, t):  # so that states a rounding apart would show
        return 1000 * x

    start = x_img.to(dtype)
    found = flow_edit(steep, steep, start, edit_times(9, 0.8), generators(1, 2, 3))
    assert torch.equal(found.latents, start)
    assert found.latents.dtype == dtype
    assert torch.equal(start, x_img.to(dtype))


def test_flow_edit_moves_the_source_to_the_target(x_img, noise):
    target = x_img.flip(0) + 1
    found = flow_edit(
        towards(x_img), towards(target), x_img, edit_times(10, 0.7), generators(1, 2, 3)
    )
    torch.testing.assert_close(found.latents, target, atol=1e-5, rtol=0)
    assert found.nfe == 14


def test_flow_edit_sees_the_picture_under_noise_and_the_edit_under_the_same(x_img):
    seen = {"source": [], "target": []}

    def field(name, velocity):
        def call(x, t):
            seen[name].append((x, t))
            return torch.full_like(x, velocity)

        return call

    times = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    flow_edit(field("source", 1.0), field("target", 3.0), x_img, times, generators(1, 2, 3))
    draws = generators(1, 2, 3)
    for step, t in enumerate((0.2, 0.6)):
        fresh = torch.stack([torch.randn(2, 4, 6, generator=one) for one in draws])
        (source, t_source), (target, t_target) = seen["source"][step], seen["target"][step]
        assert t_source == t_target == t
        torch.testing.assert_close(source, t * x_img + (1 - t) * fresh)
        torch.testing.assert_close(target, source + 0.8 * step)  # moved by 0.4 · (3 - 1) a step


def test_flow_edit_averages_over_noises(x_img):
    found = flow_edit(
        lambda x, t: torch.zeros_like(x),
        lambda x, t: x**2,
        x_img,
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        generators(1, 2, 3),
        n_avg=4,
    )
    noises = torch.stack(
        [torch.randn(4, 2, 4, 6, generator=one) for one in generators(1, 2, 3)], dim=1
    )
    torch.testing.assert_close(found.latents, x_img + noises.square().mean(0))
    assert found.nfe == 8


def test_a_callback_follows_an_edit_and_may_replace_it(x_img):
    seen = []

    def on_step(index, t, x):
        seen.append((index, float(t)))
        return torch.zeros_like(x) if index == 1 else None

    times = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    found = flow_edit(gaussian, gaussian, x_img, times, generators(1, 2, 3), on_step=on_step)
    assert seen == [(0, 0.75), (1, 1.0)]
    assert torch.equal(found.latents, torch.zeros_like(x_img))


@pytest.mark.parametrize("n_avg", [0, 1.5, True])
def test_an_average_over_no_noise_is_refused(x_img, n_avg):
    with pytest.raises(SettingsError, match="n_avg must be a whole number of at least 1"):
        flow_edit(gaussian, gaussian, x_img, time_grid(2), generators(1, 2, 3), n_avg=n_avg)


def test_flow_edit_needs_a_generator_for_each_picture(x_img):
    with pytest.raises(SettingsError, match="got 2 generators for 3 images"):
        flow_edit(gaussian, gaussian, x_img, time_grid(2), generators(1, 2))


def test_inversion_finds_the_noise_a_picture_comes_from(x_img, noise):
    found = invert(gaussian, x_img.double(), time_grid(400), noise=noise.double(), gamma=0)
    torch.testing.assert_close(found.latents, 2 * (x_img.double() - 1.5), atol=0.02, rtol=0)
    assert found.nfe == 400


def test_inverting_and_sampling_gives_the_picture_back_within_the_solvers_error(x_img, noise):
    errors = []
    for num in (50, 100):
        times = time_grid(num)
        x_0 = invert(gaussian, x_img.double(), times, noise=noise.double(), gamma=0).latents
        x = regenerate(gaussian, x_0, x_img.double(), times, eta=0).latents
        errors.append(reconstruction_error(x_img, x).max().item())
    assert 1e-5 < errors[1] < 0.55 * errors[0] < 0.02


def test_inversion_at_full_gamma_ends_at_the_noise(x_img, noise):
    found = invert(gaussian, x_img, time_grid(9, shift=2.0), noise=noise, gamma=1)
    torch.testing.assert_close(found.latents, noise, atol=1e-6, rtol=0)


def test_inversion_mixes_the_flow_back_with_the_way_to_the_noise(x_img, noise):
    times = torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64)
    found = invert(gaussian, x_img, times, noise=noise, gamma=0.3).latents
    x = x_img
    for t, h in ((1.0, 0.25), (0.75, 0.75)):
        x = x + h * (-0.7 * gaussian(x, t) + 0.3 * (noise - x) / t)
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)


def test_inversion_may_stop_at_the_noise_level_of_an_edit(x_img, noise):
    found = invert(gaussian, x_img, edit_times(10, 0.4), noise=noise, gamma=1).latents
    t0 = torch.tensor(0.6, dtype=torch.float64)
    torch.testing.assert_close(found, interpolate(noise, x_img, t0), atol=1e-6, rtol=0)


def test_a_solver_that_looks_at_the_noise_itself_is_refused(x_img, noise):
    with pytest.raises(SettingsError, match=r"'heun' evaluates at t = 0.* use euler"):
        invert(gaussian, x_img, time_grid(2), noise=noise, solver="heun")


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_better_solvers_invert_better(x_img, noise, solver):
    def error(solver, num):
        x, times = x_img.double(), time_grid(num)
        x_0 = invert(gaussian, x, times, noise=noise, gamma=0, solver=solver).latents
        back = regenerate(gaussian, x_0, x, times, eta=0, solver=solver).latents
        return reconstruction_error(x, back).max().item()

    assert error(solver, 10) < 0.3 * error("euler", 20)


def test_regeneration_is_held_to_the_picture_until_it_is_let_go(x_img, noise):
    times = time_grid(4)
    found = regenerate(gaussian, noise, x_img, times, eta=0.9, stop=0.5).latents
    x = noise
    for t in (0.0, 0.25):
        x = x + 0.25 * (0.1 * gaussian(x, t) + 0.9 * (x_img - x) / (1 - t))
    for t in (0.5, 0.75):
        x = x + 0.25 * gaussian(x, t)
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)


def test_regeneration_held_to_the_end_is_the_picture(x_img, noise):
    found = regenerate(gaussian, noise, x_img, time_grid(6), eta=1, stop=1).latents
    torch.testing.assert_close(found, x_img, atol=1e-6, rtol=0)


def test_regeneration_that_is_not_held_is_plain_sampling(x_img, noise):
    plain = solve(gaussian, noise, time_grid(6)).latents
    for eta, stop in ((0, 1), (1, 0)):
        found = regenerate(gaussian, noise, x_img, time_grid(6), eta=eta, stop=stop).latents
        assert torch.equal(found, plain)


def test_inversion_and_regeneration_call_back(x_img, noise):
    seen = []
    on_step = lambda index, t, x: seen.append((index, float(t)))  # noqa: E731
    invert(gaussian, x_img, time_grid(2, shift=3.0), noise=noise, on_step=on_step)
    regenerate(gaussian, noise, x_img, time_grid(2, shift=3.0), on_step=on_step)
    assert seen == [(0, 0.75), (1, 1.0), (0, 0.25), (1, 1.0)]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "1"])
@pytest.mark.parametrize("name", ["gamma", "eta", "stop"])
def test_shares_out_of_range_are_refused(x_img, noise, name, value):
    call = partial(regenerate, gaussian, noise, x_img, time_grid(2))
    if name == "gamma":
        call = partial(invert, gaussian, x_img, time_grid(2), noise=noise)
    with pytest.raises(SettingsError, match=f"{name} must be a number from 0 to 1"):
        call(**{name: value})


def test_reconstruction_error_is_relative_to_the_picture():
    x_img = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    x = torch.tensor([[3.0, 4.5], [0.0, 2.0]])
    torch.testing.assert_close(reconstruction_error(x_img, x), torch.tensor([0.1, 0.0]).double())


def test_an_edit_does_not_depend_on_its_batch(x_img, noise, mask):
    def every(rows, seeds):
        image, start, times = x_img[rows], noise[rows], edit_times(6, 0.7)
        x, _ = start_of_edit(image, start, 0.7)
        x_0 = invert(gaussian, image, time_grid(5), noise=start).latents
        return [
            solve(gaussian, x, times, on_step=Inpainting(image, start, mask)).latents,
            flow_edit(
                gaussian, lambda x, t: torch.sin(3 * x), image, times, generators(*seeds), n_avg=2
            ).latents,
            regenerate(gaussian, x_0, image, time_grid(5)).latents,
        ]

    together = every(slice(None), (7, 8, 9))
    backwards = every([2, 1, 0], (9, 8, 7))
    alone = every(slice(1, 2), (8,))
    for whole, turned, single in zip(together, backwards, alone, strict=True):
        assert torch.equal(whole[1:2], single)
        assert torch.equal(whole, turned.flip(0))


def test_methods_go_by_name_or_with_settings():
    assert [make_edit(name) for name in EDITS] == [SDEdit(), FlowEdit(), Inversion()]
    own = FlowEdit(n_avg=3)
    assert make_edit(own) is own
    for unknown in ("sdedits", FlowEdit, None):
        with pytest.raises(SettingsError, match=r"unknown edit .*known: sdedit, flowedit, inv"):
            make_edit(unknown)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (FlowEdit, {"n_avg": 0}, "n_avg must be a whole number of at least 1, got 0"),
        (FlowEdit, {"source_guidance_scale": "2"}, "source_guidance_scale must be .*, got '2'"),
        (Inversion, {"gamma": 1.5}, "gamma must be a number from 0 to 1, got 1.5"),
        (Inversion, {"eta": -1}, "eta must be a number from 0 to 1, got -1"),
        (Inversion, {"stop": True}, "stop must be a number from 0 to 1, got True"),
    ],
)
def test_settings_of_a_method_are_checked_when_it_is_made(method, settings, message):
    with pytest.raises(SettingsError, match=message):
        method(**settings)


@pytest.mark.parametrize("method", [SDEdit(), FlowEdit(n_avg=2), Inversion(0.3, 0.8, 0.6)])
def test_a_method_does_what_its_functions_do(x_img, noise, method):
    def target(x, t):
        return torch.sin(3 * x)

    times, seen = edit_times(8, 0.75), []

    def on_step(index, t, x):
        seen.append((index, float(t), x))
        return x

    run = EditRun(
        x_img, target, times, 0.75, gaussian, noise, generators=generators(1, 2, 3), solver="euler"
    )
    method.run(run, on_step)
    if method == SDEdit():
        expected = solve(target, start_of_edit(x_img, noise, 0.75)[0], times).latents
    elif isinstance(method, FlowEdit):
        expected = flow_edit(gaussian, target, x_img, times, generators(1, 2, 3), n_avg=2).latents
    else:
        x_0 = invert(gaussian, x_img, times, noise=noise, gamma=0.3).latents
        expected = regenerate(target, x_0, x_img, times, eta=0.8, stop=0.6).latents
        assert torch.equal(seen[5][2], x_0)
    assert torch.equal(seen[-1][2], expected)
    assert [index for index, _, _ in seen] == list(range(6 * method.rounds))
    forth = times[1:].tolist()
    assert [t for _, t, _ in seen][-6:] == forth
    if method.rounds == 2:
        assert [t for _, t, _ in seen][:6] == pytest.approx(times.flip(0)[1:].tolist())


def test_adaptive_solvers_invert_by_their_tolerances(x_img, noise):
    x, times = x_img[:1].double(), time_grid(2)
    errors = []
    for tolerance in (1e-2, 1e-9):
        options = {"solver": "dopri5", "rtol": tolerance, "atol": tolerance}
        x_0 = invert(gaussian, x, times, noise=noise[:1].double(), gamma=0, **options).latents
        back = regenerate(gaussian, x_0, x, times, eta=0, **options).latents
        errors.append(reconstruction_error(x, back).item())
    assert errors[1] < 1e-7 < errors[0]
