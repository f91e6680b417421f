"""The operations' public calls: arguments checked in words, then the backend that serves them."""
