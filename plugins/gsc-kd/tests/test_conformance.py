from kdcore.testing import conformance

TestConformance = conformance("kd-gsc-kd")
