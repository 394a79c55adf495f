from kdcore.testing import conformance

TestConformance = conformance("kd-symbolic-kd")
