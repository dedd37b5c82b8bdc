"""python -m tests.replaced_experts: says whether vLLM's routed experts are others, once its plugins are loaded."""

if __name__ == "__main__":
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    print("RoutedExperts" in op_registry_oot)
