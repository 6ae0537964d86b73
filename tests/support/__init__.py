"""What the tests share: real Redis servers, real processes, bounded waits."""
