"""The parts of the demo: the oscillator and its fit, the simulated scan, the maps."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyproc.core.errors import ArgumentValueError
from lazyproc.demo import simulate
from lazyproc.demo.maps import compare, draw_maps
from lazyproc.demo.oscillator import PARAMETERS, fit, fit_oscillator, response
from lazyproc.demo.simulate import MAIN_DATASET, TRUTH_GROUP, frequencies, simulate_scan, truth

MAPS = ("Amplitude", "Resonance", "Quality", "Phase")


def complex_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


# --- the oscillator --------------------------------------------------------------------------------------------------


def test_the_response_at_resonance_is_amplitude_times_quality_and_a_quarter_turn():
    assert response(350e3, 2e-3, 350e3, 150.0, 0.3) == pytest.approx(0.3 * np.exp(1j * (0.3 + np.pi / 2)))


def test_the_response_broadcasts_over_positions():
    maps = {name: values.reshape(-1, 1) for name, values in truth(3, 2).items()}
    assert response(frequencies(10), *(maps[name] for name in MAPS)).shape == (6, 10)


@settings(max_examples=100, deadline=None)
@given(
    amplitude=st.floats(1e-12, 1e6),
    resonance=st.floats(336e3, 364e3),
    quality=st.floats(60.0, 400.0),
    phase=st.floats(-3.14, 3.14),
    n_bins=st.integers(32, 200),
)
def test_without_noise_the_fit_gives_the_truth(amplitude, resonance, quality, phase, n_bins):
    frequency = frequencies(n_bins)
    found = fit_oscillator(response(frequency, amplitude, resonance, quality, phase), frequency)
    assert found[:3] == pytest.approx((amplitude, resonance, quality), rel=1e-6)
    assert found[3] == pytest.approx(phase, abs=1e-6)
    assert found[4] == pytest.approx(1.0)


def test_with_noise_the_fit_is_right_within_a_few_per_cent():
    rng = np.random.default_rng(5)
    true = {"Amplitude": 1e-3, "Resonance": 352e3, "Quality": 180.0, "Phase": -1.0}
    clean = response(frequencies(64), *true.values())
    spectra = clean + 0.03 * np.abs(clean).max() * complex_noise(rng, (200, 64))
    found = [fit(spectrum.astype(np.complex64), 330e3, 370e3) for spectrum in spectra]
    maps = {name: np.array([[one[name] for one in found]]) for name in PARAMETERS}
    errors = compare(maps, {name: np.full((1, 200), value) for name, value in true.items()})
    assert errors["Amplitude"][0] < 0.03
    assert errors["Resonance"][0] < 2e-4
    assert errors["Quality"][0] < 0.04
    assert errors["Phase"][0] < 0.03
    assert maps["R2"].min() > 0.8


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n_bins=st.integers(4, 80), scale=st.sampled_from([1e-30, 1e-3, 1e12]))
def test_noise_alone_gives_numbers_within_their_ranges(seed, n_bins, scale):
    frequency = frequencies(n_bins)
    found = fit_oscillator(scale * complex_noise(np.random.default_rng(seed), (n_bins,)), frequency)
    assert np.isfinite(found).all()
    amplitude, resonance, quality, phase, r_squared = found
    assert amplitude > 0.0
    assert 300e3 < resonance < 400e3
    assert 1.0 <= quality <= 1e5
    assert -np.pi < phase <= np.pi
    assert r_squared <= 1.0


@pytest.mark.parametrize("spectrum", [np.ones(8) + 0j, np.eye(1, 8, 3)[0] * 1j, -np.ones(8) - 0j])
def test_a_spectrum_that_is_no_resonance_gives_numbers(spectrum):
    assert np.isfinite(fit_oscillator(spectrum, frequencies(8))).all()


@pytest.mark.parametrize("spectrum", [np.zeros(8, complex), np.full(8, np.nan + 0j), np.array([1j] * 7 + [np.inf])])
def test_a_spectrum_without_a_meaning_gives_nan(spectrum):
    assert np.isnan(fit_oscillator(spectrum, frequencies(8))).all()


@pytest.mark.parametrize(
    ("spectrum", "frequency", "message"),
    [
        (np.ones(8), frequencies(8), "complex"),
        (np.ones(8, complex), frequencies(7), "same one dimension"),
        (np.ones(3, complex), frequencies(3), "at least 4"),
        (np.ones(8, complex), frequencies(8)[::-1], "ascending"),
    ],
)
def test_what_cannot_be_fitted_is_refused(spectrum, frequency, message):
    with pytest.raises(ArgumentValueError, match=message):
        fit_oscillator(spectrum, frequency)


# --- the scan --------------------------------------------------------------------------------------------------------


def test_the_scan_is_a_usid_file(tmp_path):
    address = simulate_scan(tmp_path / "scan.h5", 5, 7, 16)
    assert address == f"{tmp_path / 'scan.h5'}::{MAIN_DATASET}"
    with h5py.File(tmp_path / "scan.h5") as file:
        main = file[MAIN_DATASET]
        assert (main.shape, main.dtype, main.chunks) == ((35, 16), np.dtype("c8"), None)
        assert (main.attrs["quantity"], main.attrs["units"]) == ("Cantilever response", "V")
        ancillaries = {
            name: file[main.attrs[name]]
            for name in ("Position_Indices", "Position_Values", "Spectroscopic_Indices", "Spectroscopic_Values")
        }
        for name, dataset in ancillaries.items():
            of_positions = name.startswith("Position")
            assert dataset.shape == ((35, 2) if of_positions else (1, 16))
            assert list(dataset.attrs["labels"]) == ([b"X", b"Y"] if of_positions else [b"Frequency"])
            assert list(dataset.attrs["units"]) == ([b"um", b"um"] if of_positions else [b"Hz"])
        indices = ancillaries["Position_Indices"][:]
        assert indices[:, 0].tolist() == list(range(7)) * 5
        assert indices[:, 1].tolist() == np.repeat(range(5), 7).tolist()
        np.testing.assert_allclose(ancillaries["Position_Values"][:], indices * 4.0 / 7, rtol=1e-6)
        np.testing.assert_allclose(ancillaries["Spectroscopic_Values"][0], frequencies(16), rtol=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.h5"]


def test_pyusid_opens_the_scan_as_a_main_dataset(tmp_path):
    simulate_scan(tmp_path / "scan.h5", 5, 7, 16)
    script = (
        "import sys, h5py, pyUSID\n"
        "(main,) = pyUSID.hdf_utils.get_all_main(h5py.File(sys.argv[1]))\n"
        "assert main.get_n_dim_form().shape == (5, 7, 16) or main.get_n_dim_form().shape == (7, 5, 16)\n"
        "assert main.pos_dim_labels == ['X', 'Y'] and main.pos_dim_sizes == [7, 5]\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "scan.h5")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [np.complex64, np.float32])
def test_the_data_are_the_response_of_the_truth_with_the_noise(tmp_path, dtype):
    true = truth(12, 20, seed=4)
    clean = response(frequencies(32), *(true[name].reshape(-1, 1) for name in MAPS))
    for noise in (0.0, 0.03):
        simulate_scan(tmp_path / f"{noise}.h5", 12, 20, 32, noise=noise, seed=4, dtype=dtype)
        with h5py.File(tmp_path / f"{noise}.h5") as file:
            data = file[MAIN_DATASET][:]
            for name in MAPS:
                np.testing.assert_allclose(file[TRUTH_GROUP][name][:], true[name], rtol=1e-6, atol=1e-6)
        assert data.dtype == dtype
        expected = clean if dtype == np.complex64 else np.abs(clean)
        if noise == 0.0:
            np.testing.assert_allclose(data, expected, rtol=1e-5)
        elif dtype == np.complex64:
            residual = (data - expected).view(np.float64)
            assert residual.std() == pytest.approx(0.03 * 0.2, rel=0.05)
            assert abs(residual.mean()) < 3e-4


def test_the_truth_has_domains_and_stays_within_the_band():
    true = truth(64, 64)
    assert all(values.shape == (64, 64) for values in true.values())
    up = np.cos(true["Phase"] + 0.8) > 0
    assert 0.2 < up.mean() < 0.8
    walls = true["Amplitude"] < 0.3e-3
    assert 0.01 < walls.mean() < 0.3
    assert true["Resonance"].min() > 337e3
    assert true["Resonance"].max() < 363e3
    assert true["Quality"].min() > 60.0
    assert true["Quality"].max() < 350.0


def test_a_finer_scan_shows_the_same_film():
    coarse, fine = truth(16, 16), truth(48, 48)
    for name in MAPS:
        np.testing.assert_allclose(fine[name][1::3, 1::3], coarse[name], rtol=1e-9)


def test_the_seed_decides(tmp_path):
    def scan(name: str, seed: int) -> np.ndarray:
        simulate_scan(tmp_path / name, 6, 6, 8, seed=seed)
        with h5py.File(tmp_path / name) as file:
            return file[MAIN_DATASET][:]

    first = scan("a.h5", 1)
    np.testing.assert_array_equal(first, scan("b.h5", 1))
    assert not np.allclose(first, scan("c.h5", 2))


@given(n_rows=st.integers(1, 40), n_columns=st.integers(1, 40), piece=st.integers(1, 2000))
def test_the_pieces_cover_every_position_once_in_order(n_rows, n_columns, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_PIECE_BYTES", piece * 8 * 16)
        pieces = list(simulate._pieces(n_rows, n_columns, 16))
    numbers = np.arange(n_rows * n_columns).reshape(n_rows, n_columns)
    parts = [numbers[rows, columns].ravel() for rows, columns in pieces]
    np.testing.assert_array_equal(np.concatenate(parts), numbers.ravel())
    assert max(part.size for part in parts) <= piece


def test_a_scan_written_in_many_pieces_has_the_same_film(tmp_path, monkeypatch):
    simulate_scan(tmp_path / "one.h5", 7, 9, 8, noise=0.0)
    monkeypatch.setattr(simulate, "_PIECE_BYTES", 4 * 8 * 8)
    simulate_scan(tmp_path / "many.h5", 7, 9, 8, noise=0.0)
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "many.h5") as many:
        np.testing.assert_allclose(many[MAIN_DATASET][:], one[MAIN_DATASET][:], rtol=1e-6)
        for name in ("Position_Indices", "Position_Values"):
            np.testing.assert_array_equal(many[f"Measurement_000/{name}"][:], one[f"Measurement_000/{name}"][:])


def test_an_existing_file_and_bad_numbers_are_refused(tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"precious")
    with pytest.raises(ArgumentValueError, match="exists"):
        simulate_scan(tmp_path / "scan.h5")
    assert (tmp_path / "scan.h5").read_bytes() == b"precious"
    for wrong in ({"n_rows": 0}, {"n_bins": 3}, {"noise": -1.0}, {"noise": np.nan}, {"dtype": np.int16}):
        with pytest.raises(ArgumentValueError, match=r"expected"):
            simulate_scan(tmp_path / "new.h5", **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.h5"]


def test_a_failure_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "_fill", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate_scan(tmp_path / "scan.h5", 4, 4)
    assert list(tmp_path.iterdir()) == []


# --- the maps --------------------------------------------------------------------------------------------------------


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_maps_become_a_png(tmp_path):
    true = truth(24, 24)
    fitted = {name: values * 1.01 for name, values in true.items()}
    fitted["Amplitude"][12:] = np.nan
    frequency = frequencies(64)
    spectrum = response(frequency, 1e-3, 350e3, 200.0, 2.0)
    example = (frequency, spectrum + 0.006 * complex_noise(np.random.default_rng(0), (64,)), spectrum)
    draw_maps(tmp_path / "maps.png", fitted, true, "Fit against truth", example=example, extent=(0, 4, 4, 0))
    assert png_size(tmp_path / "maps.png") == (1600, 1200)
    assert (tmp_path / "maps.png").stat().st_size > 50_000


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 2)])
def test_maps_of_any_shape_are_drawn(tmp_path, shape):
    true = truth(*shape)
    nothing_fitted = {name: np.full(shape, np.nan) for name in MAPS}
    draw_maps(tmp_path / "maps.png", nothing_fitted, true, "Nothing yet")
    assert png_size(tmp_path / "maps.png")[0] == 1600


def test_compare_is_relative_but_for_the_phase():
    true = {"Amplitude": np.full((2, 2), 2.0), "Phase": np.full((2, 2), 3.1)}
    fitted = {"Amplitude": np.array([[2.2, 1.8], [2.2, np.nan]]), "Phase": np.full((2, 2), -3.1), "R2": np.ones((2, 2))}
    errors = compare(fitted, true)
    assert list(errors) == ["Amplitude", "Phase"]
    assert errors["Amplitude"] == pytest.approx((0.1, 0.1))
    assert errors["Phase"] == pytest.approx((2 * np.pi - 6.2,) * 2)


def test_maps_that_do_not_match_are_refused(tmp_path):
    true = truth(4, 4)
    with pytest.raises(ArgumentValueError, match="Phase"):
        draw_maps(tmp_path / "maps.png", {n: true[n] for n in MAPS[:3]}, true, "")
    with pytest.raises(ArgumentValueError, match="one shape"):
        compare({"Quality": np.ones(16)}, true)
