{{- define "dspark.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 46 characters: with a longer one the names of pods (NAME-HASH-RANDOM) are cut, and queries do not find them. */}}
{{- define "dspark.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 46 | trimSuffix "-" -}}
{{- else if contains (include "dspark.name" .) .Release.Name -}}
{{- .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "dspark.name" .) | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "dspark.selector" -}}
app.kubernetes.io/name: {{ include "dspark.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dspark.serverSelector" -}}
{{ include "dspark.selector" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "dspark.labels" -}}
{{ include "dspark.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "dspark.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "dspark.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "dspark.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* Seconds that the first start may take, and some more. */}}
{{- define "dspark.startSeconds" -}}
{{- add 600 (mul .Values.probes.startup.periodSeconds .Values.probes.startup.failureThreshold) -}}
{{- end -}}

{{/* Host and port for calls: the gateway's, where there is one. */}}
{{- define "dspark.front" -}}
{{- if .Values.gateway.enabled -}}
{{ include "dspark.fullname" . }}-gateway:{{ .Values.gateway.ports.grpc }}
{{- else -}}
{{ include "dspark.fullname" . }}:{{ .Values.service.ports.grpc }}
{{- end -}}
{{- end -}}

{{/* Port of the store that artifacts are fetched from. */}}
{{- define "dspark.s3Port" -}}
{{- $url := urlParse .Values.modelRepository.s3.endpoint -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "http" | ternary "80" "443") -}}
{{- end -}}

{{/* Drain, exit timeout, 3 s until dspark-serve ends Triton by force, and 12 s for what takes long in a busy pod. */}}
{{- define "dspark.gracePeriod" -}}
{{- $needed := add .Values.server.drainSeconds .Values.server.exitTimeoutSeconds 15 | int -}}
{{- $given := .Values.server.terminationGracePeriodSeconds | int -}}
{{- if and $given (lt $given $needed) -}}
{{- fail (printf "server.terminationGracePeriodSeconds: expected 0 or at least %d (drainSeconds + exitTimeoutSeconds + 15), got %d" $needed $given) -}}
{{- end -}}
{{- $given | default $needed -}}
{{- end -}}

{{/* Folder that holds verifier/1 and drafter/1. */}}
{{- define "dspark.artifacts" -}}
{{- if eq .Values.modelRepository.source "image" -}}
{{ .Values.modelRepository.imagePath }}
{{- else -}}
/artifacts
{{- end -}}
{{- end -}}

{{- define "dspark.artifactsVolume" -}}
{{- $repository := .Values.modelRepository -}}
{{- if eq $repository.source "pvc" -}}
persistentVolumeClaim: {claimName: {{ $repository.pvc.claimName | quote }}, readOnly: true}
{{- else if and (eq $repository.source "export") $repository.export.artifactsClaim -}}
persistentVolumeClaim: {claimName: {{ $repository.export.artifactsClaim | quote }}}
{{- else if eq $repository.source "export" -}}
emptyDir: {sizeLimit: {{ $repository.export.sizeLimit | quote }}}
{{- else -}}
emptyDir: {sizeLimit: {{ $repository.s3.sizeLimit | quote }}}
{{- end -}}
{{- end -}}

{{/* Quantities of small containers that only lay files or ask one question. */}}
{{- define "dspark.smallResources" -}}
requests: {cpu: 100m, memory: 128Mi}
limits: {cpu: "1", memory: 512Mi}
{{- end -}}

{{/* PromQL of the share of drafts that the verify budget left out, by pod: 0 while nothing drafts. Takes labels. */}}
{{- define "dspark.pressureQuery" -}}
{{- $by := "by (namespace, pod)" -}}
{{- $rounds := printf "(sum(rate(dspark_spec_decode_num_drafts_total{%[1]s}[2m])) %[2]s + sum(rate(dspark_spec_decode_drafter_skips_total{%[1]s}[2m])) %[2]s)" . $by -}}
{{- $places := printf "count(dspark_spec_decode_num_verified_tokens_per_pos_total{%s}) %s" . $by -}}
{{- $verified := printf "sum(rate(dspark_spec_decode_num_verified_tokens_total{%s}[2m])) %s" . $by -}}
{{- printf "100 * (1 - %s / (%s * (%s > 0))) or 0 * sum(dspark_num_requests_running{%s}) %s" $verified $places $rounds . $by -}}
{{- end -}}
