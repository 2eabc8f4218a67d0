"""Code that several test modules share. Contains no tests."""
