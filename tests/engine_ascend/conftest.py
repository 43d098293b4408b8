collect_ignore = [
    "contract"
]  # for other versions of vLLM: test_contract.py runs it in processes of its own
