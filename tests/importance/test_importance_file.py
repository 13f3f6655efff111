"""The importance file: round trip, ranking with ties, and refusals."""

import pytest
import torch

from lit_puzzle.importance.importance_file import Importance, best_experts


def test_file_round_trip_ranking_and_refusals(tmp_path):
    scores = (torch.tensor([0.5, 0.25, 0.5, 0.125]), torch.tensor([1.0, 2.0]))
    saved = Importance("abc", "reap", 12, scores)
    saved.save(tmp_path)
    loaded = Importance.load(tmp_path)
    assert (loaded.fingerprint, loaded.method, loaded.tokens) == ("abc", "reap", 12)
    assert [s.tolist() for s in loaded.scores] == [s.tolist() for s in scores]
    assert loaded.keep([1, 1]) == ((0,), (1,))  # a tie goes to the lower index
    assert best_experts(scores[0], 3) == (0, 1, 2)
    loaded.check_parent("abc")
    with pytest.raises(ValueError, match="of parent abc, not of xyz"):
        loaded.check_parent("xyz")
    for counts in ([1], [0, 1], [1, 3]):
        with pytest.raises(ValueError, match="give"):
            loaded.keep(counts)
    with pytest.raises(ValueError, match=r"recipes/final_kl\.yaml"):
        Importance.load(tmp_path / "elsewhere")
    (tmp_path / "importance.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        Importance.load(tmp_path)
