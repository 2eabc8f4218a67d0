"""What several test modules share; none of these modules holds tests."""
