"""The order of the test files: the longest first, so that all processes of a run end at about the same time."""

LONGEST = (
    "test_images test_train test_slurm test_resume test_readme test_doctor test_kernels test_sharded test_bench "
    "test_hosts test_failures test_distributed test_elastic test_crash_matrix test_cluster test_adam test_launch"
).split()


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: within a file as it is
