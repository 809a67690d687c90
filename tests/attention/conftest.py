from rank_pool import ranks  # noqa: F401 - a fixture
