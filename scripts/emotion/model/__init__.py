"""The artifact folder, one class per runtime, training, the Hub."""
