{{/*
The beginning of all names: the release's name, with the chart's where the release has another. With what follows it, and a
statefulset's own suffix, a name has at most 63 characters.
*/}}
{{- define "mx.base" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 44 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 44 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "mx.server" -}}{{ include "mx.base" . }}-server{{- end -}}

{{/* The headless Service: a DNS name for each replica, and what Prometheus scrapes. */}}
{{- define "mx.pods" -}}{{ include "mx.base" . }}-server-pods{{- end -}}

{{- define "mx.host" -}}
{{- printf "%s.%s.svc.%s" (include "mx.server" .) .Release.Namespace .Values.clusterDomain -}}
{{- end -}}

{{- define "mx.url" -}}
{{- printf "%s://%s:8080" (ternary "https" "http" .Values.tls.enabled) (include "mx.host" .) -}}
{{- end -}}

{{- define "mx.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mx.labels" -}}
{{- with .Values.commonLabels }}{{ toYaml . }}
{{ end -}}
{{ include "mx.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "mx.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}
{{- else -}}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "mx.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else -}}
{{- ternary (include "mx.server" .) "default" .Values.serviceAccount.create -}}
{{- end -}}
{{- end -}}

{{/* "true" if the server asks the API server, and so needs a token. */}}
{{- define "mx.asksApi" -}}
{{- if or (eq .Values.metadata.store "kubernetes") (eq .Values.auth.mode "kubernetes") }}true{{ end -}}
{{- end -}}

{{- define "mx.tlsSecret" -}}
{{- if .Values.tls.certManager.enabled }}{{ include "mx.server" . }}-tls{{ else }}{{ .Values.tls.secret }}{{ end -}}
{{- end -}}

{{/* "true" if the Secret of the certificate also has the authority that signed it. */}}
{{- define "mx.tlsSecretHasCa" -}}
{{- if and .Values.tls.enabled (or .Values.tls.certManager.enabled .Values.tls.secretHasCa) }}true{{ end -}}
{{- end -}}

{{/* The ConfigMap with the authority that clients check the certificate against; empty: their system's. */}}
{{- define "mx.clientCa" -}}
{{- if .Values.tls.enabled -}}
{{- if .Values.tls.clientCa.pem }}{{ include "mx.base" . }}-ca{{ else }}{{ .Values.tls.clientCa.configMap }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "mx.clientCaKey" -}}
{{- ternary "ca.crt" .Values.tls.clientCa.key (ne .Values.tls.clientCa.pem "") -}}
{{- end -}}

{{/* "true" if several servers share a metadata store. */}}
{{- define "mx.manyReplicas" -}}
{{- if or (eq .Values.workload.kind "daemonset") (gt (int .Values.workload.replicas) 1) }}true{{ end -}}
{{- end -}}

{{/*
Where the other replicas reach this one; empty: each downloads by itself. With TLS it must be a name that the certificate
has, which the address of a pod is not.
*/}}
{{- define "mx.replicaEndpoint" -}}
{{- if and .Values.cache.enabled (include "mx.manyReplicas" .) -}}
{{- if eq .Values.workload.kind "statefulset" -}}
$(POD_NAME).{{ include "mx.pods" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:8001
{{- else if not .Values.tls.enabled -}}
{{ ternary "[$(POD_IP)]:8001" "$(POD_IP):8001" (hasPrefix "[" .Values.listenAddress) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
"true" if models are also sent as raw bytes. A ticket is of one replica: each of several tells readers its own address, or the
Service of a daemonset leads to the replica of the caller's node. Replicas without an address, which are those of a deployment
with TLS, send none.
*/}}
{{- define "mx.bulk" -}}
{{- if and .Values.cache.enabled (or (eq .Values.workload.kind "daemonset") (eq (int .Values.workload.replicas) 1) (include "mx.replicaEndpoint" .)) }}true{{ end -}}
{{- end -}}

{{/* "true" if replicas read from each other with a token of their service account. */}}
{{- define "mx.ownAccountToken" -}}
{{- if and (eq .Values.auth.mode "kubernetes") (include "mx.replicaEndpoint" .) }}true{{ end -}}
{{- end -}}

{{/* A quantity in bytes. */}}
{{- define "mx.bytes" -}}
{{- $units := dict "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mul (regexFind "^[0-9]+" .) (get $units (regexFind "[A-Za-z]+$" .)) -}}
{{- end -}}

{{- define "mx.cacheMaxBytes" -}}
{{- if .Values.cache.maxBytes -}}
{{- .Values.cache.maxBytes -}}
{{- else -}}
{{- div (mul (include "mx.bytes" .Values.cache.size) 9) 10 -}}
{{- end -}}
{{- end -}}

{{/* Ports from a first one, one for each rank: a list for Istio, a range for Linkerd. */}}
{{- define "mx.portList" -}}
{{- $ports := list -}}
{{- range $first := .first -}}
{{- range $rank := until (int $.count) -}}
{{- $ports = append $ports (toString (add $first $rank)) -}}
{{- end -}}
{{- end -}}
{{- join "," $ports -}}
{{- end -}}

{{- define "mx.portRanges" -}}
{{- $ranges := list -}}
{{- range $first := .first -}}
{{- $ranges = append $ranges (ternary (toString $first) (printf "%d-%d" (int $first) (sub (add (int $first) (int $.count)) 1)) (eq (int $.count) 1)) -}}
{{- end -}}
{{- join "," $ranges -}}
{{- end -}}

{{/*
Annotations that lead bytes past a mesh's proxies. For workers: NIXL's ports from 5555 and the bulk channel's from 7655, one
for each rank, and the server's bulk port. WorkerService stays in the mesh.
*/}}
{{- define "mx.workerMesh" -}}
{{- $own := dict "first" (list 5555 7655) "count" .Values.mesh.tensorParallelSize -}}
{{- if eq .Values.mesh.kind "istio" -}}
traffic.sidecar.istio.io/excludeInboundPorts: {{ include "mx.portList" $own | quote }}
traffic.sidecar.istio.io/excludeOutboundPorts: {{ printf "%s,8002" (include "mx.portList" $own) | quote }}
{{- else if eq .Values.mesh.kind "linkerd" -}}
config.linkerd.io/skip-inbound-ports: {{ include "mx.portRanges" $own | quote }}
config.linkerd.io/skip-outbound-ports: {{ printf "%s,8002" (include "mx.portRanges" $own) | quote }}
{{- end -}}
{{- end -}}

{{- define "mx.serverMesh" -}}
{{- if eq .Values.mesh.kind "istio" -}}
traffic.sidecar.istio.io/excludeInboundPorts: "8002,8003"
traffic.sidecar.istio.io/excludeOutboundPorts: "8002"
{{- else if eq .Values.mesh.kind "linkerd" -}}
config.linkerd.io/skip-inbound-ports: "8002,8003"
config.linkerd.io/skip-outbound-ports: "8002"
{{- end -}}
{{- end -}}

{{/* What pods of workers need in their environment. */}}
{{- define "mx.clientEnv" -}}
MODEL_EXPRESS_URL: {{ include "mx.url" . | quote }}
{{- if include "mx.clientCa" . }}
MX_TLS_CA_PATH: /etc/modelexpress/ca/{{ include "mx.clientCaKey" . }}
{{- end }}
{{- if and (has .Values.auth.mode (list "token" "kubernetes")) .Values.auth.acceptPlaintextTokens }}
MX_AUTH_TOKEN_PLAINTEXT: "1"
{{- end }}
{{- with .Values.client.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
