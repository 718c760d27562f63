from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.prompt_chunks import chunk_budget, neighbours


class TestBudget:
    def test_whole_chunk_while_nothing_streams(self):
        assert chunk_budget(1, False, 256, 64) == 256

    def test_grows_with_the_prompts_up_to_the_whole_chunk(self):
        assert [chunk_budget(prompts, True, 256, 64) for prompts in (1, 2, 3, 4, 50)] == [64, 128, 192, 256, 256]

    def test_never_more_than_engines_are_built_for(self):
        assert [chunk_budget(prompts, True, 32, 64) for prompts in (1, 9)] == [32, 32]


class TestNeighbours:
    def test_near_prompts_share_a_run(self):
        assert neighbours([3, 4, 5], [100, 100, 56]) == [[0, 1, 2]]

    def test_far_prompts_run_alone(self):
        assert neighbours([60, 2, 3], [100, 80, 76]) == [[1, 2], [0]]

    def test_a_short_piece_beside_a_long_one(self):
        # 2 rows of 200, of 228 that count; with a slot between them it would be 600.
        assert neighbours([0, 1], [200, 28]) == [[0, 1]]
        assert neighbours([0, 2], [200, 28]) == [[0], [1]]

    def test_nothing(self):
        assert neighbours([], []) == []

    @given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 256)), unique_by=lambda piece: piece[0], max_size=12))
    def test_every_piece_once_and_no_run_with_much_padding(self, pieces):
        slots, lengths = [slot for slot, _ in pieces], [length for _, length in pieces]
        runs = neighbours(slots, lengths)
        assert sorted(place for run in runs for place in run) == list(range(len(pieces)))
        for run in runs:
            taken = [slots[place] for place in run]
            assert taken == sorted(taken)
            padded = (taken[-1] - taken[0] + 1) * max(lengths[place] for place in run)
            assert padded <= 2 * sum(lengths[place] for place in run)
