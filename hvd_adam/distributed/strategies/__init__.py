"""What the strategies of `distribute` do differently."""
