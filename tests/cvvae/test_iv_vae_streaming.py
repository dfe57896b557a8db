"""A clip in chunks gives the numbers of one pass, for IV-VAE and every step from its baseline."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvvae import SPECS, seeded_vae
from cvvae.iv_vae import IVVAE_SPECS
from cvvae.streaming import plan_chunks

ALL_TINY = [name for name in IVVAE_SPECS if name.endswith("-tiny")]
ROUNDING = {"rtol": 0, "atol": 2e-5}  # of values about 1


def random_video(num_frames, *, batch=1, height=16, width=24, seed=0):
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def stream(step, x, lengths):
    state, outs, start = None, [], 0
    for length in lengths:
        out, state = step(x[:, :, start : start + length], state)
        outs.append(out)
        start += length
    assert start == x.shape[2]
    return torch.cat(outs, dim=2), state


@pytest.fixture(scope="module", params=ALL_TINY)
def any_vae(request):
    return seeded_vae(SPECS[request.param], seed=2)


@pytest.fixture(scope="module")
def vae():
    return seeded_vae(SPECS["ivvae-z4-tiny"], seed=2)


@torch.inference_mode()
def test_every_model_streams_with_the_numbers_of_one_pass(any_vae):
    video = random_video(25, batch=2)
    moments, _ = any_vae.encode_chunk(video, None)
    got, _ = stream(any_vae.encode_chunk, video, [1, 8, 4, 12])
    assert moments.shape == (2, 8 if any_vae.spec.latent_channels == 4 else 32, 7, 2, 3)
    torch.testing.assert_close(got, moments, **ROUNDING)
    torch.testing.assert_close(any_vae.encode(video).mean, moments.chunk(2, dim=1)[0], **ROUNDING)

    latent = moments.chunk(2, dim=1)[0]
    pixels, _ = any_vae.decode_chunk(latent, None)
    got, _ = stream(any_vae.decode_chunk, latent, [2, 1, 1, 3])
    assert pixels.shape == video.shape
    torch.testing.assert_close(got, pixels, **ROUNDING)
    torch.testing.assert_close(any_vae.decode(latent), pixels, **ROUNDING)


@torch.inference_mode()
def test_the_beginning_of_a_video_has_the_beginning_of_its_latents(any_vae):
    video = random_video(13)
    whole = any_vae.encode(video).mean
    for num_latents in (1, 2, 3):
        beginning = any_vae.encode(video[:, :, : 1 + 4 * (num_latents - 1)]).mean
        torch.testing.assert_close(beginning, whole[:, :, :num_latents], **ROUNDING)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), first=st.integers(0, 3))
def test_any_chunks_will_do(vae, lengths, first):
    groups = [first, *lengths]
    video = random_video(1 + 4 * sum(groups), height=8, width=8)
    with torch.inference_mode():
        moments, _ = vae.encode_chunk(video, None)
        got, _ = stream(vae.encode_chunk, video, [1 + 4 * first, *(4 * length for length in lengths)])
        torch.testing.assert_close(got, moments, **ROUNDING)
        latent = moments.chunk(2, dim=1)[0]
        pixels, _ = vae.decode_chunk(latent, None)
        got, _ = stream(vae.decode_chunk, latent, [1 + first, *lengths])
        torch.testing.assert_close(got, pixels, **ROUNDING)


@torch.inference_mode()
def test_the_state_has_one_frame_per_convolution_however_long_the_video(vae):
    _, short = vae.encode_chunk(random_video(5), None)
    _, long = stream(vae.encode_chunk, random_video(41), [9, 32])
    assert [tuple(kept.shape) for kept in short] == [tuple(kept.shape) for kept in long]
    assert len(short) == 13
    assert {kept.shape[2] for kept in short} == {1}
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in long), "no view keeps an activation alive"
    _, decoding = vae.decode_chunk(torch.zeros(1, 4, 2, 2, 2), None)
    assert len(decoding) == 19


@torch.inference_mode()
def test_streams_do_not_disturb_each_other(vae):
    videos = [random_video(13, seed=seed) for seed in (1, 2)]
    expected = [vae.encode(video).mean for video in videos]
    states, outs = [None, None], [[], []]
    for start, stop in ((0, 5), (5, 9), (9, 13)):
        for number, video in enumerate(videos):
            before = states[number]
            copies = None if before is None else [kept.clone() for kept in before]
            out, states[number] = vae.encode_chunk(video[:, :, start:stop], before)
            outs[number].append(out.chunk(2, dim=1)[0])
            if copies is not None:
                assert all(torch.equal(kept, copy) for kept, copy in zip(before, copies, strict=True))
    for got, mean in zip(outs, expected, strict=True):
        torch.testing.assert_close(torch.cat(got, dim=2), mean, **ROUNDING)


@torch.inference_mode()
def test_clips_of_a_batch_do_not_see_each_other(any_vae):
    video = random_video(9, batch=3)
    alone = torch.cat([any_vae.encode(clip).mean for clip in video.split(1)])
    torch.testing.assert_close(any_vae.encode(video).mean, alone, **ROUNDING)


def test_gradients_flow_through_a_whole_clip(vae):
    video = random_video(9, height=8, width=8).requires_grad_()
    vae.decode(vae.encode(video).mean).sum().backward()
    assert (video.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()


@pytest.mark.parametrize(
    ("step", "shape", "message"),
    [
        ("first", (1, 3, 4, 16, 24), r"expected 1 \+ 4\*k frames in the first chunk, got 4"),
        ("next", (1, 3, 5, 16, 24), r"expected 4\*k frames, got 5"),
        ("next", (1, 3, 0, 16, 24), "none empty"),
        ("first", (1, 3, 5, 12, 24), "height: expected a positive multiple of 8"),
        ("next", (2, 3, 4, 16, 24), "state: expected that of a chunk of the same batch and size"),
        ("next", (1, 3, 4, 16, 16), "state: expected that of a chunk of the same batch and size"),
        ("swapped", (1, 3, 4, 16, 24), "state: expected 13 tensors, .* got 19"),
    ],
)
@torch.inference_mode()
def test_chunks_that_do_not_fit_are_refused(vae, step, shape, message):
    state = None
    if step == "next":
        _, state = vae.encode_chunk(random_video(5), None)
    if step == "swapped":
        _, state = vae.decode_chunk(torch.zeros(1, 4, 1, 2, 3), None)
    with pytest.raises(ValueError, match=message):
        vae.encode_chunk(torch.zeros(shape), state)


@torch.inference_mode()
def test_a_spec_with_tiles_does_not_stream():
    tiled = seeded_vae(replace(SPECS["ivvae-z4-tiny"], tile_frames=8), seed=2)
    assert not tiled.streams
    assert tiled.encode(random_video(17)).mean.shape == (1, 4, 5, 2, 3)
    with pytest.raises(ValueError, match="tile_frames=8 and tile_size=None ask for tiles"):
        tiled.encode_chunk(random_video(5), None)
    with pytest.raises(ValueError, match="does not stream"):
        tiled.decode_chunk(torch.zeros(1, 4, 2, 2, 2), None)


@given(num_frames=st.integers(1, 200), chunk=st.integers(1, 40))
def test_chunks_cover_every_frame_once(num_frames, chunk):
    chunks = plan_chunks(num_frames, chunk=chunk)
    assert [frame for tile in chunks for frame in range(tile.start, tile.stop)] == list(range(num_frames))
    assert chunks[0].num_frames == 1
    assert all(tile.num_frames <= chunk and tile.drop == 0 for tile in chunks)


def test_chunk_plans_without_frames_are_refused():
    with pytest.raises(ValueError, match="expected num_frames and chunk >= 1, got 0 and 4"):
        plan_chunks(0, chunk=4)


@torch.inference_mode()
def check_compiled_chunks(vae, backend):
    """A steady chunk of both directions, compiled as ONE graph: state goes in and comes out."""
    video = random_video(9, height=8, width=16)
    first, state = vae.encode_chunk(video[:, :, :5], None)
    expected, expected_state = vae.encode_chunk(video[:, :, 5:], state)
    compiled = torch.compile(vae.encode_chunk, fullgraph=True, dynamic=False, backend=backend)
    got, got_state = compiled(video[:, :, 5:], state)
    torch.testing.assert_close(got, expected, **ROUNDING)
    torch.testing.assert_close(got_state, expected_state, rtol=0, atol=1e-4)

    latent = torch.cat([first, expected], dim=2).chunk(2, dim=1)[0]
    _, state = vae.decode_chunk(latent[:, :, :2], None)
    expected, _ = vae.decode_chunk(latent[:, :, 2:], state)
    compiled = torch.compile(vae.decode_chunk, fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(compiled(latent[:, :, 2:], state)[0], expected, **ROUNDING)


@pytest.mark.slow
def test_the_steady_chunk_is_one_graph(vae):
    check_compiled_chunks(vae, backend="eager")


@pytest.mark.slow  # the compiler takes a minute or more
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ivvae-z4-tiny", "ivvae-baseline-tiny"])
def test_the_steady_chunk_compiles(name):
    check_compiled_chunks(seeded_vae(SPECS[name], seed=2), backend="inductor")
