"""An empty module in front of MLflow's for the processes that tests start: DeepSpeed's launcher imports it, for seconds."""
