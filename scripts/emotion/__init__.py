"""What the commands share. A folder imports only those before it: common, task, model, quantize, measure, report."""
