from kdcore.testing import conformance

TestConformance = conformance("kd-llm-kd-suite")
